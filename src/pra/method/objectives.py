"""The losses of a training step (paper; docs/method.md), with every stop-gradient written out.

    reconstruction pass   h0 = sg(F(c, x));  z = norm(G(x, h0));  x^ = D(z)      pixel, perceptual
                          the same pixels from perturbed states, D(z~)           perturbed
                          both, after the deblocking filter                      deblocked
    AR pass               x~ = sg(rollout);  h = F(c, x~)                        flow on sg(z), auxiliary
                          the second head, for sampling in few steps             shortcut on sg(h), sg(z), sg(v)

The right column names the terms of the loss, here and in every log, curve and table. ``pixel``, ``perceptual``,
``perturbed`` and ``deblocked`` train the codec only; ``flow`` and ``auxiliary`` train the backbone and the head only.
Without the stop-gradient on ``z`` the states would collapse to values that are easy to predict. JiT has one pass, and
``flow`` is its only term. To add a term, add an entry in a function below and a field ``NAME_weight`` to
:class:`pra.config.ObjectiveConfig`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.config import SHORTCUT_STEPS, EncoderInput, ObjectiveConfig, Parallel, PixelLoss, Prediction, Rollout
from pra.errors import Code, PraError
from pra.method import flow, noise
from pra.method.noise import Purpose
from pra.method.rollout import ar_inputs, perturbed
from pra.models import PRA, JiT, Model
from pra.models.head import FlowHead, velocity_from_data

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""``(reconstruction, image) -> distance per image``, both ``(B, C, H, W)`` in [-1, 1]."""

TERMS = ("pixel", "perceptual", "perturbed", "deblocked", "flow", "auxiliary", "shortcut")
"""Names of the terms in this module."""


@dataclass(frozen=True)
class LossInputs:
    """Tensors of one micro-batch from which a term of the loss is computed.

    ``B`` images have ``N`` patches each. A field may be None: JiT has neither states nor conditions, an identity codec
    does not decode, and steps of ``train.codec_warmup`` do not compute conditions.

    Attributes:
        model: call its modules. Under FSDP its blocks hold only a part of their weights between calls.
        images: ``(B, C, H, W)`` float in [-1, 1].
        patches: ``(B, N, P)`` the images' pixels by patch, in [-1, 1].
        labels: true classes ``(B,)``, or rows ``(B, 1 + L)`` of a class and a caption.
        keys: ``(B,)`` one key per sample and step, for random numbers (:mod:`pra.method.noise`) that resume bitwise.
        states: ``(B, N, d)`` the encoder's states ``z``, with gradient.
        decoded: ``(B, N, P)`` float32, the pixels ``D(z)``, with gradient.
        conditions: ``(B, N, D)`` the backbone's ``h`` of the AR pass, with gradient.
    """

    model: Model
    images: Tensor
    patches: Tensor
    labels: Tensor
    keys: Tensor
    states: Tensor | None = None
    decoded: Tensor | None = None
    conditions: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """A term of the loss from outside the package.

    ``function`` returns a scalar: the mean over the batch, not yet multiplied by ``weight``. It may return None to
    leave the term out of a step, for example where ``conditions`` is None. This choice must not depend on the images.
    """

    weight: float
    function: Callable[[LossInputs], Tensor | None]


ExtraTerms = Mapping[str, LossTerm]


def check_terms(
    losses: Mapping[str, LossTerm | tuple[float, Callable[[LossInputs], Tensor | None]]] | None,
    taken: Collection[str] = TERMS,
) -> dict[str, LossTerm]:
    """Return the user's terms as :class:`LossTerm`; pairs ``(weight, function)`` are converted.

    Raises:
        PraError: a name that is ``taken`` or not an identifier, a weight that is not finite, or a term that is neither
            a pair nor a :class:`LossTerm`.
    """
    terms = {}
    for name, given in (losses or {}).items():
        if not isinstance(name, str) or not name.isidentifier():
            raise _bad_term(name, "the name is not an identifier. Use letters, digits and _")
        if name in taken or name.startswith("validation_"):
            raise _bad_term(name, "the name is taken. Choose another name", "conflict")
        pair = isinstance(given, tuple) and len(given) == 2
        term = LossTerm(*given) if pair else given  # type: ignore[misc]
        if not isinstance(term, LossTerm) or not callable(term.function):
            raise _bad_term(name, "expected (weight, function). Pass such a pair or a LossTerm")
        if isinstance(term.weight, bool) or not isinstance(term.weight, int | float) or not math.isfinite(term.weight):
            raise _bad_term(name, f"weight {term.weight!r} is not a finite number. Pass one such as 0.1")
        terms[name] = term
    return terms


def _bad_term(name: str, problem: str, code: Code = "invalid") -> PraError:
    return PraError(f"loss term {name!r}: {problem}", code=code, name=name)


class Losses(NamedTuple):
    """Means over the batch: the weighted sum ``total``, and the ``terms`` by name, without weights.

    ``state_std`` is the smallest standard deviation of a state dimension over the batch. Near 0 the states collapsed.
    """

    total: Tensor
    terms: dict[str, Tensor]
    state_std: Tensor

    def measured(self) -> dict[str, Tensor]:
        """Return every value by name, without gradient: a line of ``metrics.jsonl``."""
        named = {"total": self.total, **self.terms, "state_std": self.state_std}
        return {name: value.detach() for name, value in named.items()}


def training_losses(
    model: Model,
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    objective: ObjectiveConfig,
    rollout: Rollout | None,
    perceptual: Perceptual | None = None,
    extra: ExtraTerms | None = None,
) -> Losses:
    """Compute the losses of one training step.

    Args:
        model: the model.
        images: ``(B, C, H, W)`` float in [-1, 1].
        labels: ``(B,)`` true classes, or rows ``(B, 1 + L)`` of a class and a caption.
        keys: ``(B,)`` one key per sample and step; decides all randomness.
        objective: weights of the terms, and numbers of draws.
        rollout: makes the AR inputs. None skips the AR pass, so that only the codec learns. JiT ignores it.
        perceptual: a distance whose weight is ``objective.perceptual_weight``. JiT ignores it.
        extra: terms from outside the package, by name; they are added last.

    Raises:
        PraError: a term from outside the package is not a scalar tensor.
    """
    given = LossInputs(model, images, model.patchify(images), labels, keys)
    if model.config.autoregressive:
        given, terms = _autoregressive_terms(model, given, objective, rollout, perceptual)
    else:
        terms = _diffusion_terms(model, given, objective)
    weighted = [objective.weight(name) * term for name, term in terms.items()]
    for name, term in (extra or {}).items():
        value = term.function(given)
        if value is not None:
            terms[name] = _scalar(name, value)
            weighted.append(term.weight * value)
    # Add in the order of the terms: rounding depends on it.
    total = functools.reduce(operator.add, weighted)
    states = given.patches if given.states is None else given.states.detach()
    return Losses(total, terms, states.flatten(0, 1).std(dim=0).min())


def _scalar(name: str, value: object) -> Tensor:
    """Return the value of a user's term. Refuse a value that is not a scalar tensor."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise _bad_term(name, f"expected a scalar tensor, got {found}. Return the mean over the batch")


def losses_of(model: Model) -> Callable[..., Losses]:
    """Return the function that computes a model's losses, for torch's compiler."""
    return training_losses


def _autoregressive_terms(
    model: PRA, given: LossInputs, objective: ObjectiveConfig, rollout: Rollout | None, perceptual: Perceptual | None
) -> tuple[LossInputs, dict[str, Tensor]]:
    """Run both passes. Return ``given`` with states, pixels and conditions, and the terms by name."""
    patches, labels, keys = given.patches, given.labels, given.keys

    # The reconstruction pass keeps the labels that the AR pass drops: a state depends on the image and its class, and
    # the null class stands for the mixture of the classes' states.
    with torch.no_grad():  # h0 = sg(F(c, x))
        h0 = model.clean_conditions(labels, patches)
    # Clear the cache of casts: older torch reuses low-precision weights without a gradient (pytorch#112583).
    torch.clear_autocast_cache()
    z = model.codec.encode(*mask_encoder(patches, h0, objective, keys))
    decoded = None if model.config.codec is None else model.codec.decode(z).float()
    given = replace(given, states=z, decoded=decoded)
    terms: dict[str, Tensor] = {}
    inputs = None
    if decoded is not None:
        terms, inputs = _codec_terms(model, given, z, decoded, objective, rollout, perceptual)
    z = z.detach()  # sg(z): reconstruction alone shapes the states
    if rollout is None:
        return given, terms

    # AR pass
    if inputs is None:
        with torch.no_grad():  # x~ = sg(rollout)
            inputs = ar_inputs(rollout, model, labels, patches, z, keys)
    torch.clear_autocast_cache()
    h = model.conditions(drop_labels(model, labels, objective.class_dropout, keys), inputs)
    terms["flow"] = F.mse_loss(*_velocity_and_target(model, h, z, objective, keys))
    single = patches.reshape(*patches.shape[:2], model.config.group_size, model.config.patch_dim)
    terms["auxiliary"] = F.mse_loss(model.auxiliary(h).float(), normalise_patches(single).flatten(-2))
    if model.shortcut is not None:
        guided = None
        if (most := model.config.shortcut_guidance) is not None:
            with torch.no_grad():
                guided = model.conditions(model.condition.null_like(labels), inputs), most
        terms["shortcut"] = shortcut_loss(model.head, model.shortcut, h.detach(), z, objective, keys, guided)
    return replace(given, conditions=h), terms


def _codec_terms(
    model: PRA,
    given: LossInputs,
    z: Tensor,
    decoded: Tensor,
    objective: ObjectiveConfig,
    rollout: Rollout | None,
    perceptual: Perceptual | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the terms of the reconstruction pass.

    With ``perturbed_weight`` also return the inputs ``(B, N - 1, P)`` of the parallel rollout, decoded on the way.
    """
    pixel = F.l1_loss if objective.pixel_loss is PixelLoss.L1 else F.mse_loss
    terms = {"pixel": pixel(decoded, given.patches)}
    inputs = None
    deblocks = model.codec.deblock is not None
    perceives = perceptual is not None and objective.perceptual_weight
    pictures = [model.picture(decoded)] if deblocks or perceives else []
    if perceptual is not None and perceives:
        terms["perceptual"] = perceptual(pictures[0], given.images).mean()
    if objective.perturbed_weight and isinstance(rollout, Parallel):
        inexact = model.codec.decode(perturbed(z, rollout.t_min, given.keys)).float()
        terms["perturbed"] = pixel(inexact, given.patches)
        inputs = inexact.detach()[:, :-1].clamp(-1.0, 1.0)  # equal to rollout.parallel, without a second decoding
        pictures += [model.picture(inexact)] if deblocks else []
    if deblocks:
        terms["deblocked"] = torch.stack([pixel(picture, given.images) for picture in pictures]).mean()
    return terms, inputs


def mask_encoder(
    patches: Tensor, conditions: Tensor | None, objective: ObjectiveConfig, keys: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the encoder's inputs, ``(B, N, P)`` and ``(B, N, D)``, with the masked tokens of one of them zeroed."""
    if not objective.encoder_masking:
        return patches, conditions
    drawn = noise.uniform(noise.fold(keys, Purpose.ENCODER_MASK), patches.shape[1], 1)
    masked = drawn < objective.encoder_masking
    if objective.encoder_masks is EncoderInput.PATCH:
        return patches.masked_fill(masked, 0.0), conditions
    return patches, None if conditions is None else conditions.masked_fill(masked, 0.0)


def _diffusion_terms(model: JiT, given: LossInputs, objective: ObjectiveConfig) -> dict[str, Tensor]:
    """Return JiT's v-loss ``E |v(x_t, t, c) - (x - x_t) / (1 - t)|^2``; all patches of an image share ``t``."""
    x, keys = given.patches, given.keys
    t = _times(objective, keys, 1)
    eps = noise.normal(noise.fold(keys, Purpose.FLOW_NOISE), *x.shape[1:])
    x_t = flow.interpolate(eps, x, t.unsqueeze(-1))
    target = velocity_from_data(x, x_t, t.unsqueeze(-1))  # clamps 1 - t as the model does
    velocity = model(x_t, t, drop_labels(model, given.labels, objective.class_dropout, keys))
    return {"flow": F.mse_loss(velocity, target)}


def flow_errors(model: PRA, h: Tensor, z: Tensor, objective: ObjectiveConfig, keys: Tensor) -> Tensor:
    """Return the squared errors ``|v(z_t, t, h) - (z - eps)|^2`` of L_flow, ``(B, draws, N, d)``."""
    velocity, target = _velocity_and_target(model, h, z, objective, keys)
    return (velocity - target).square()


def _velocity_and_target(
    model: PRA, h: Tensor, z: Tensor, objective: ObjectiveConfig, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the head's velocity and its target, ``(B, draws, N, d)`` each.

    Every token gets several draws of ``(t, eps)``: the head is cheap, and ``h`` is not.
    """
    draws, tokens = objective.noise_draws, z.shape[1]
    t = _times(objective, keys, draws, tokens)
    eps = noise.normal(noise.fold(keys, Purpose.FLOW_NOISE), draws, tokens, z.shape[2])
    z = z.unsqueeze(1)
    z_t = flow.interpolate(eps, z, t.unsqueeze(-1))
    if model.head.prediction is Prediction.DATA:  # clamps 1 - t as the head does
        target = velocity_from_data(z, z_t, t.unsqueeze(-1))
    else:
        target = flow.velocity(eps, z)
    return model.head(z_t, t, model.head.project(h).unsqueeze(1)), target


def shortcut_loss(
    head: FlowHead,
    shortcut: FlowHead,
    h: Tensor,
    z: Tensor,
    objective: ObjectiveConfig,
    keys: Tensor,
    guided: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Return the shortcut loss: a step must equal two steps of half its span (arXiv 2410.12557, eq. 5).

    The loss is ``E |s(z_t, t, h, span) - sg(mean of the two half steps)|^2``. The target of the shortest steps is the
    midpoint rule on the head's velocity. Unlike in the paper, steps have a head of their own.

    Args:
        head: the head of velocities; gives targets only.
        shortcut: the head of steps, which learns.
        h: ``(B, N, D)`` conditions without gradient.
        z: ``(B, N, d)`` states without gradient.
        objective: ``shortcut_draws`` steps are drawn for each token.
        keys: ``(B,)``.
        guided: ``h`` of the null condition and the largest guidance scale, for a head that reads the scale
            (arXiv 2210.03142). Its target is the guided velocity.
    """
    draws, tokens = objective.shortcut_draws, z.shape[1]
    t, span = flow.dyadic_steps(noise.fold(keys, Purpose.SHORTCUT_TIME), len(SHORTCUT_STEPS), draws, tokens)
    eps = noise.normal(noise.fold(keys, Purpose.SHORTCUT_NOISE), draws, tokens, z.shape[2])
    z_t = flow.interpolate(eps, z.unsqueeze(1), t.unsqueeze(-1))
    condition, scale = shortcut.project(h).unsqueeze(1), None
    if guided is not None:
        scale = 1 + (guided[1] - 1) * noise.uniform(noise.fold(keys, Purpose.SHORTCUT_GUIDANCE), draws, tokens)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        conditional: Tensor = head(z, t, head_condition)
        if guided is None or scale is None:
            return conditional
        unconditional = head(z, t, head.project(guided[0]).unsqueeze(1))
        return unconditional + scale.unsqueeze(-1) * (conditional - unconditional)  # type: ignore[no-any-return]

    with torch.no_grad():
        head_condition, half = head.project(h).unsqueeze(1), span / 2
        half_way = z_t + half.unsqueeze(-1) * velocity(z_t, t)
        exact = velocity(half_way, t + half)
        first = shortcut(z_t, t, condition, half, scale=scale)
        second = shortcut(z_t + half.unsqueeze(-1) * first, t + half, condition, half, scale=scale)
        shortest = span < 1.5 / max(SHORTCUT_STEPS)
        target = torch.where(shortest.unsqueeze(-1), exact, (first + second) / 2)
    torch.clear_autocast_cache()
    return F.mse_loss(shortcut(z_t, t, condition, span, scale=scale), target)


def _times(objective: ObjectiveConfig, keys: Tensor, *shape: int) -> Tensor:
    key = noise.fold(keys, Purpose.FLOW_TIME)
    if not objective.logit_normal_times:
        return flow.uniform_times(key, *shape)
    return flow.logit_normal_times(key, *shape, mean=objective.time_mean, std=objective.time_std)


def normalise_patches(patches: Tensor) -> Tensor:
    """Normalise each patch to zero mean and unit variance: the target of MAE (arXiv 2111.06377, "normalised pixels").

    Flat patches and patches of a single number become zeros.
    """
    variance, mean = torch.var_mean(patches, dim=-1, correction=min(1, patches.shape[-1] - 1), keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def drop_labels(model: Model, labels: Tensor, probability: float, keys: Tensor) -> Tensor:
    """Replace labels by the null condition with a ``probability``, for classifier-free guidance."""
    return model.condition.drop(labels, noise.uniform(noise.fold(keys, Purpose.CLASS_DROPOUT)), probability)
