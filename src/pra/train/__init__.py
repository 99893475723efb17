"""Training: one loop, its optimiser, moving average, checkpoints and a run's folder."""

from pra.train.loop import train

__all__ = ["train"]
