"""Sharing: export and push a model with its card, and a pipeline for diffusers."""
