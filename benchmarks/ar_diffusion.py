"""The image models of autoregressive-diffusion-pytorch (extra ``bench``) at the sizes of one of ours."""

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
"""The width of its head's hidden layers where none is given."""


def flow_model(size: ModelConfig, evaluations: int, mlp_width: int | None = None) -> nn.Module:
    """Its image flow model; ``sample(batch_size)`` gives images in [0, 1], by its midpoint rule.

    Its own number of evaluations is 30: 16 times, 15 intervals of two evaluations each.

    Args:
        size: of a square image.
        evaluations: of its head per token, even.
        mlp_width: of its head's hidden layers, in place of that of ours.

    Raises:
        PraError: the package is not installed, or does not support the sizes.
    """
    if evaluations < 2 or evaluations % 2:
        raise PraError(f"{PACKAGE} takes its midpoint rule's two evaluations an interval: {evaluations} is not even")
    arguments = _arguments(size)
    if mlp_width is not None:
        arguments["model"]["mlp_width"] = mlp_width
    model = library().flow(**arguments)
    # No argument leads there: its sampler calls this with the condition alone.
    flow = model.model.flow
    flow.sample = partial(flow.sample, num_sample_steps=evaluations // 2 + 1)
    return model.eval()  # type: ignore[no-any-return]


def diffusion_model(size: ModelConfig, evaluations: int) -> nn.Module:
    """Its image diffusion model, of the same transformer and head; Heun's rule, whose last interval is Euler's.

    Args:
        size: of a square image.
        evaluations: of its head per token, odd.

    Raises:
        PraError: as :func:`flow_model`.
    """
    if evaluations < 3 or not evaluations % 2:
        raise PraError(
            f"Heun's rule whose last interval is Euler's takes an odd number of at least 3, not {evaluations}"
        )
    arguments = _arguments(size)
    arguments["model"]["diffusion_kwargs"] = {"num_sample_steps": (evaluations + 1) // 2}
    return library().diffusion(**arguments).eval()  # type: ignore[no-any-return]


def _arguments(size: ModelConfig) -> dict[str, Any]:
    height, width = size.image_size
    if height != width:
        raise PraError(f"{PACKAGE} makes square images, not {height}x{width}")
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
            "mlp_width": 3 * head.width // 2,  # the hidden layer of our blocks
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
