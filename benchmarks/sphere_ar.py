"""The generator of SphereAR (arXiv 2509.24335) from the user's checkout, built with the sizes of one of our models.

This file does not hold SphereAR's code. SphereAR's VAE needs one function of flash-attn. Without that package, torch's
attention replaces the function and computes the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import CodecConfig, ModelConfig
from pra.errors import PraError

PATCH = 16
"""The only patch size of SphereAR's VAE."""


def sphere_ar(checkout: Path, size: ModelConfig, compile: bool = False) -> nn.Module:
    """Build SphereAR with random weights.

    Its ``sample(labels, sample_steps, cfg_scale)`` runs the head ``sample_steps + 1`` times per token.

    Args:
        checkout: the folder of a clone.
        size: the sizes of our model, which has states and a square grid of patches.
        compile: leave SphereAR's ``torch.compile`` on.

    Raises:
        PraError: the folder is not a checkout, cannot be imported or is of an unknown version, or SphereAR does not
            support the sizes.
    """
    if not (checkout / "SphereAR" / "model.py").is_file():
        raise PraError(f"{checkout} is not a checkout of SphereAR: SphereAR/model.py is missing")
    if not isinstance(size.codec, CodecConfig) or size.grid[0] != size.grid[1]:
        raise PraError("SphereAR: it generates states on a square grid. Use a recipe that has both")
    if "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn") is None:
        stand_in = types.ModuleType("flash_attn")
        stand_in.flash_attn_func = _attention  # type: ignore[attr-defined]
        sys.modules["flash_attn"] = stand_in
    torch.compiler.set_stance("default" if compile else "force_eager")
    sys.path.insert(0, str(checkout.resolve()))
    try:
        made = importlib.import_module("SphereAR.model").SphereAR(**_arguments(size))
    except Exception as error:  # code of others may raise anything
        raise PraError(f"SphereAR in {checkout} cannot be used: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    return made.eval()  # type: ignore[no-any-return]


def tokens_alone(model: Any) -> Any:
    """Make the model return its latents, in place of the VAE's images."""
    model.vae.decode = lambda latents: latents
    return model


def _arguments(size: ModelConfig) -> dict[str, Any]:
    return {
        "dim": size.backbone.width,
        "n_layer": size.backbone.depth,
        "n_head": size.backbone.heads,
        "diff_layers": size.head.depth,
        "diff_dim": size.head.width,
        "diff_adanln_layers": size.head.modulations,
        "latent_dim": size.state_dim,
        "patch_size": PATCH,
        "resolution": PATCH * size.grid[0],
        "diff_batch_mul": 1,
        "cls_token_num": size.class_tokens,
        "num_classes": size.num_classes,
    }


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, dropout_p: float = 0.0) -> Tensor:
    """``flash_attn_func``: ``(B, length, heads, width)`` each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal).transpose(1, 2)
