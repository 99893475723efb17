"""Quality of generated images: FID and related figures, by two protocols, with their provenance."""

from pra.evaluation.classifier import fit_classifier
from pra.evaluation.evaluate import Report, evaluate, reconstruct
from pra.evaluation.features import FeatureExtractor, Features, inception
from pra.evaluation.reference import Reference, from_file, from_source

__all__ = [
    "FeatureExtractor", "Features", "Reference", "Report", "evaluate", "fit_classifier", "from_file", "from_source",
    "inception", "reconstruct",
]  # fmt: skip
