"""How good generated images are: FID and its kin, with the two protocols' differences and the figures' provenance."""

from pra.eval.classifier import fit_classifier
from pra.eval.evaluate import Report, evaluate, reconstruct
from pra.eval.features import FeatureExtractor, Features, inception
from pra.eval.reference import Reference, from_file, from_source

__all__ = [
    "FeatureExtractor", "Features", "Reference", "Report", "evaluate", "fit_classifier", "from_file", "from_source",
    "inception", "reconstruct",
]  # fmt: skip
