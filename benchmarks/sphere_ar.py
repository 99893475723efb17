"""The generator of SphereAR (arXiv 2509.24335) from a checkout that the user names, at the sizes of one of ours.

None of its code is here. It needs flash-attn where it does not use its cache: in its VAE. Without that package its one
function is stood in for by torch's attention, which computes the same.
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
"""The only patch size of its VAE."""


def sphere_ar(checkout: Path, size: ModelConfig, compile: bool = False) -> nn.Module:
    """Its model with random weights; ``sample(labels, sample_steps, cfg_scale)`` runs the head ``sample_steps + 1``
    times per token.

    Args:
        checkout: the folder of a clone.
        size: of a model with states, on a square grid of patches.
        compile: leave its ``torch.compile`` on.

    Raises:
        PraError: no checkout, one that cannot be imported or differs from the one this was written for, or sizes that
            it has not.
    """
    if not (checkout / "SphereAR" / "model.py").is_file():
        raise PraError(f"{checkout} is not a checkout of SphereAR: SphereAR/model.py is missing")
    if not isinstance(size.codec, CodecConfig) or size.grid[0] != size.grid[1]:
        raise PraError("SphereAR generates states on a square grid: take a recipe that has both")
    if "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn") is None:
        stand_in = types.ModuleType("flash_attn")
        stand_in.flash_attn_func = _attention  # type: ignore[attr-defined]
        sys.modules["flash_attn"] = stand_in
    torch.compiler.set_stance("default" if compile else "force_eager")
    sys.path.insert(0, str(checkout.resolve()))
    try:
        made = importlib.import_module("SphereAR.model").SphereAR(**_arguments(size))
    except Exception as error:  # whatever somebody else's code may raise
        raise PraError(f"SphereAR in {checkout} cannot be used: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    return made.eval()  # type: ignore[no-any-return]


def tokens_alone(model: Any) -> Any:
    """The same model, which returns its latents in place of what the VAE decodes from them."""
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
