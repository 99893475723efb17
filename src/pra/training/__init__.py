"""Training: one loop, its optimiser, moving average, checkpoints and a run's folder."""

from pra.training.loop import train

__all__ = ["train"]
