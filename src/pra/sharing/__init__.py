"""Models on the Hugging Face Hub: to load one from there, to share a run with its card, a pipeline for diffusers."""
