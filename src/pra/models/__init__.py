"""The model: backbone, head, states and their composition. Knows no optimiser, path, device or command line."""

from pra.models.pra import PRA

__all__ = ["PRA"]
