"""Runs and evaluations side by side: `pra compare`."""
