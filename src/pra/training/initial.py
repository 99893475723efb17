"""Weights to begin a run with, from another run or model: for another set of classes, or for a second head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pra.config import AnyModelConfig, differences, to_dict
from pra.errors import PraError
from pra.models import Model, weights
from pra.utils.provenance import file_sha256

EMBEDDING = "condition.embedding.weight"
"""The one tensor whose shape depends on the classes: ``(num_classes + 1, ...)``, the null class last."""


def load_initial(path: str, model: Model, average: str = weights.EMA) -> dict[str, Any]:
    """Gives a new model the weights of another, by the names of the classes.

    Where the new model has a second head and the other has none, that
    begins as the first: whatever the length of a step, it gives the velocity at its start.

    Args:
        path: the other's, as :func:`pra.load` takes it.
        model: the new model, its ``classes`` named.
        average: which of the other's weights, as :func:`pra.load` takes it.

    Returns:
        Where they come from, for ``environment.json``: ``from``, the path as given; ``weights``, the file; ``sha256``.

    Raises:
        PraError: as :func:`pra.load`; or the models differ in more than their classes and the second head.
    """
    folder = weights.model_folder(path)
    other = weights.load(folder, average)
    check_same_model(path, other.config, model.config)
    tensors = with_classes(other, model.classes)
    if model.config.has_shortcut and not other.config.has_shortcut:
        tensors |= _second_head(model, tensors)
    model.load_state_dict(tensors)
    file = folder / weights.weights_name(folder, average)
    return {"from": path, "weights": os.path.abspath(file), "sha256": file_sha256(file)}


def check_same_model(path: str, there: AnyModelConfig, asked: AnyModelConfig) -> None:
    """Whether a model can begin with the weights of another, which lies at ``path``.

    Raises:
        PraError: they differ in more than their classes and the second head, which the new one may have.
    """
    expected = replace(there, num_classes=asked.num_classes)
    if asked.has_shortcut and expected.autoregressive:
        expected = replace(expected, head=replace(expected.head, shortcut=True))
    changed = differences(to_dict(expected), to_dict(asked), "model")
    if changed:
        differing = "; ".join(changed).replace(" in the run, ", " there, ")
        raise PraError(
            f"the weights of {path} are of another model ({differing}); pictures are scaled to its size: "
            "leave such settings out, or train from the start, without --from"
        )


def _second_head(model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a new second head that gives what the first gives."""
    own, last = model.state_dict(), "shortcut.span_in.2."
    names = [name for name in own if name.startswith("shortcut.")]
    first = {name: tensors.get(name.replace("shortcut.", "head.", 1), own[name]) for name in names}
    return first | {name: torch.zeros_like(own[name]) for name in names if name.startswith(last)}


@torch.no_grad()
def with_classes(model: Model, classes: Sequence[str]) -> dict[str, Tensor]:
    """A model's tensors for another set of classes; all but the class embedding are its own.

    A class that the model knows by name keeps its embedding. A new one begins with that of the null class, and that
    row stays as it is: class dropout has trained it as the mixture of all that the model has seen. So a new class
    begins as a picture of any kind, under a condition that every layer knows, where a random row is one that none has
    ever met. And guidance, which follows the difference between the two, begins at none instead of in a random
    direction.
    """
    rows = model.condition.rows_for(model.classes, classes)
    tensors = model.state_dict()
    return {name: tensor[rows] if name == EMBEDDING else tensor for name, tensor in tensors.items()}
