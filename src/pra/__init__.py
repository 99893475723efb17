"""Autoregressive image generation straight in pixel space, with Parallel Rollout Approximation (arXiv 2606.27978).

import pra

model = pra.load("runs/demo")
images = pra.Sampler(model).sample(labels=[3, 7], seeds=[0, 1])
pra.to_pil(images[0])
"""

from pra.config import Precision, RunConfig, SamplingConfig
from pra.data.source import register_source
from pra.errors import PraError
from pra.evaluation.features import register_features
from pra.method.objectives import LossInputs, LossTerm
from pra.models import PRA, JiT
from pra.models.weights import load, save
from pra.recipes import RECIPES, recipe
from pra.sampling import Sampler
from pra.sharing.push import export, push
from pra.training import train
from pra.training.callbacks import Callback
from pra.training.loop import Trained
from pra.utils.pixels import to_pil, to_uint8
from pra.utils.provenance import DISTRIBUTION, package_version
from pra.utils.signals import Interrupted

__all__ = [
    "PRA", "RECIPES", "Callback", "Interrupted", "JiT", "LossInputs", "LossTerm", "PraError", "Precision", "RunConfig",
    "Sampler", "SamplingConfig", "Trained", "__version__", "export", "load", "push", "recipe", "register_features",
    "register_source", "save", "to_pil", "to_uint8", "train",
]  # fmt: skip

__version__ = package_version(DISTRIBUTION) or "(not installed)"
