"""Images for training and evaluation: where they come from, how they are prepared, in which order."""

from pra.data.loader import Batch, Sample, TrainingSet, batches, load_images
from pra.data.prepare import prepare
from pra.data.source import Source, open_source

__all__ = ["Batch", "Sample", "Source", "TrainingSet", "batches", "load_images", "open_source", "prepare"]
