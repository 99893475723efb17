"""The image models of autoregressive-diffusion-pytorch (extra ``bench``), built with the sizes of one of our models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from pra.config import ModelConfig
from pra.errors import PraError
from pra.utils.extras import import_failed, install_command

PACKAGE, NAME = "autoregressive-diffusion-pytorch", "autoregressive_diffusion_pytorch"

OWN_MLP_WIDTH = 1024
"""The package's default for the width of the head's hidden layers."""


def flow_model(size: ModelConfig, evaluations: int, mlp_width: int | None = None) -> nn.Module:
    """Build the package's image flow model. Its ``sample(batch_size)`` returns images in [0, 1], by the midpoint rule.

    The package's default is 30 evaluations: 15 intervals of two.

    Args:
        size: the sizes of our model; its images are square.
        evaluations: evaluations of the head per token, an even number of at least 2.
        mlp_width: width of the head's hidden layers; by default that of our head.

    Raises:
        PraError: the package is not installed, or does not support the sizes or the number of evaluations.
    """
    if evaluations < 2 or evaluations % 2:
        problem = (
            f"{evaluations} evaluations: the midpoint rule takes two per interval. Use an even number of at least 2"
        )
        raise PraError(problem)
    arguments = _arguments(size)
    if mlp_width is not None:
        arguments["model"]["mlp_width"] = mlp_width
    model = library().flow(**arguments)
    # Patch the method: the package's sampler calls it with the condition alone and takes no number of steps.
    flow = model.model.flow
    flow.sample = partial(flow.sample, num_sample_steps=evaluations // 2 + 1)
    return model.eval()  # type: ignore[no-any-return]


def diffusion_model(size: ModelConfig, evaluations: int) -> nn.Module:
    """Build the package's image diffusion model, with the same transformer and head as its flow model.

    It samples by Heun's rule with a last step of Euler's rule.

    Args:
        size: the sizes of our model; its images are square.
        evaluations: evaluations of the head per token, an odd number of at least 3.

    Raises:
        PraError: as :func:`flow_model`.
    """
    if evaluations < 3 or not evaluations % 2:
        raise PraError(
            f"{evaluations} evaluations: Heun's rule takes two per interval but one in the last. Use an odd number of "
            "at least 3"
        )
    arguments = _arguments(size)
    arguments["model"]["diffusion_kwargs"] = {"num_sample_steps": (evaluations + 1) // 2}
    return library().diffusion(**arguments).eval()  # type: ignore[no-any-return]


def _arguments(size: ModelConfig) -> dict[str, Any]:
    height, width = size.image_size
    if height != width:
        raise PraError(f"{height}x{width} pixels: {PACKAGE} makes square images. Use a recipe that makes square ones")
    backbone, head = size.backbone, size.head
    return {
        "image_size": height,
        "patch_size": size.patch_size,
        "channels": size.channels,
        "model": {
            "dim": backbone.width,
            "depth": backbone.depth,
            "heads": backbone.heads,
            "dim_head": backbone.width // backbone.heads,
            "mlp_depth": head.depth,
            "mlp_width": 3 * head.width // 2,  # the hidden width of our head's blocks
        },
    }


@cache
def library() -> Any:
    spec = importlib.util.find_spec(NAME)
    if spec is None:
        raise PraError(f"the comparison needs {PACKAGE}; {install_command('bench')}")
    # The package would also import its trainer, which needs torchvision, an undeclared dependency.
    package = types.ModuleType(NAME)
    package.__spec__ = spec
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules.setdefault(NAME, package)
    try:
        flow, diffusion = (
            importlib.import_module(f"{NAME}.{part}") for part in ("autoregressive_flow", "autoregressive_diffusion")
        )
    except ImportError as error:
        raise PraError(import_failed("the comparison", f"what {PACKAGE} needs", "bench", error)) from None
    for module in (flow, diffusion):
        module.tqdm = _silent  # type: ignore[attr-defined]  # the bars are not part of the work
    return SimpleNamespace(flow=flow.ImageAutoregressiveFlow, diffusion=diffusion.ImageAutoregressiveDiffusion)


def _silent(items: Any, **_: Any) -> Any:
    return items
