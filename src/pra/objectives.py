"""The losses of a training step (paper; design section 2), with every stop-gradient in sight.

    reconstruction pass   h0 = sg(F(c, x));  z = norm(G(x, h0));  x^ = D(z)      L_rec
    AR pass               x~ = sg(rollout);  h = F(c, x~)                        L_flow on sg(z), L_aux

L_rec reaches the encoder and the decoder only; L_flow and L_aux reach the backbone and the head only. Without
the stop-gradient on ``z`` the states collapse onto what is easy to predict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pra import flow, noise
from pra.config import ObjectiveConfig, PixelLoss, Prediction, Rollout
from pra.models.pra import PRA
from pra.models.states import IdentityCodec
from pra.noise import Purpose
from pra.rollout import ar_inputs

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""``(reconstruction, image) -> distance per image``, both ``(B, C, H, W)`` in [-1, 1]."""


class Losses(NamedTuple):
    """Means over the batch, and the health of the states."""

    total: Tensor
    flow: Tensor
    reconstruction: Tensor
    auxiliary: Tensor
    state_std: Tensor
    """The smallest standard deviation of a state dimension over the batch; near 0 is collapse, >= 0.5 healthy."""


def training_losses(
    model: PRA,
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    objective: ObjectiveConfig,
    rollout: Rollout,
    perceptual: Perceptual | None = None,
) -> Losses:
    """One step of the two-pass training.

    Args:
        model: the model.
        images: ``(B, C, H, W)`` float in [-1, 1].
        labels: ``(B,)`` true classes.
        keys: ``(B,)`` one key per sample and step; decides all randomness.
        objective: weights and draws.
        rollout: how the AR inputs are made.
        perceptual: a distance whose weight is ``objective.perceptual_weight``.
    """
    patches = model.patchify(images)

    # Reconstruction pass. It keeps the true label where the AR pass drops it: a state is a function of the image
    # and its class, and the null class stands for the mixture of the classes' states.
    with torch.no_grad():  # h0 = sg(F(c, x))
        h0 = model.clean_conditions(labels, patches)
    _forget_casts()
    z = model.codec.encode(patches, h0)
    reconstruction = _reconstruction_loss(model, images, patches, z, objective, perceptual)
    z = z.detach()  # sg(z): the states are shaped by reconstruction alone

    # AR pass.
    with torch.no_grad():  # x~ = sg(...)
        inputs = ar_inputs(rollout, model, labels, patches, z, keys)
    _forget_casts()
    h = model.backbone(_drop_labels(labels, model.config.null_class, objective.class_dropout, keys), inputs)
    flow_loss = _flow_loss(model, h, z, objective, keys)
    auxiliary = F.mse_loss(model.auxiliary(h).float(), normalise_patches(patches))

    total = flow_loss + reconstruction + objective.auxiliary_weight * auxiliary
    state_std = z.flatten(0, 1).std(dim=0).min()
    return Losses(total, flow_loss, reconstruction, auxiliary, state_std)


def _forget_casts() -> None:
    """Under autocast torch caches the low-precision weights, in older releases those made without gradient too
    (pytorch#112583): the pass that follows would train nothing."""
    torch.clear_autocast_cache()


def _flow_loss(model: PRA, h: Tensor, z: Tensor, objective: ObjectiveConfig, keys: Tensor) -> Tensor:
    """``E |v(z_t, t, h) - (z - eps)|^2`` with several ``(t, eps)`` per token: the head is cheap, ``h`` is not."""
    draws, tokens = objective.noise_draws, z.shape[1]
    time_key, noise_key = (noise.fold(keys, p) for p in (Purpose.FLOW_TIME, Purpose.FLOW_NOISE))
    times = flow.logit_normal_times if objective.logit_normal_times else flow.uniform_times
    t = times(time_key, draws, tokens)
    eps = noise.normal(noise_key, draws, tokens, z.shape[2])
    z = z.unsqueeze(1)
    z_t = flow.interpolate(eps, z, t.unsqueeze(-1))
    if model.head.prediction is Prediction.DATA:  # the same clamp on both sides, as in JiT
        target = flow.velocity_from_data(z, z_t, t.unsqueeze(-1))
    else:
        target = flow.velocity(eps, z)
    velocity = model.head(z_t, t, model.head.condition(h).unsqueeze(1))
    return F.mse_loss(velocity, target)


def _reconstruction_loss(
    model: PRA,
    images: Tensor,
    patches: Tensor,
    z: Tensor,
    objective: ObjectiveConfig,
    perceptual: Perceptual | None,
) -> Tensor:
    if isinstance(model.codec, IdentityCodec):
        return z.new_zeros(())
    decoded = model.codec.decode(z).float()
    pixel = F.l1_loss if objective.pixel_loss is PixelLoss.L1 else F.mse_loss
    loss = pixel(decoded, patches)
    if perceptual is not None:
        loss = loss + objective.perceptual_weight * perceptual(model.unpatchify(decoded), images).mean()
    return loss


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch to zero mean and unit variance, the target of MAE (arXiv 2111.06377, "normalised pixels")."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _drop_labels(labels: Tensor, null_class: int, probability: float, keys: Tensor) -> Tensor:
    drop = noise.uniform(noise.fold(keys, Purpose.CLASS_DROPOUT)) < probability
    return labels.masked_fill(drop, null_class)
