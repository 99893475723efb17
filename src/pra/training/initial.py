"""First weights from another run or model: for another set of classes, or for a second head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pra.config import differences, to_dict
from pra.errors import PraError
from pra.models import Model, weights
from pra.utils.provenance import file_sha256

EMBEDDING = "condition.embedding.weight"
"""The one tensor whose shape depends on the classes: ``(num_classes + 1, ...)``, the null class last."""


def load_initial(path: str, model: Model, average: str = weights.EMA) -> dict[str, Any]:
    """Give a new model the weights of another, by the names of the classes.

    A second head that the other model lacks starts as a copy of the first head: its steps of any length take the
    velocity at their start. A text reader that the other model lacks starts from scratch.

    ``path`` and ``average`` are those of :func:`pra.load`. Return the origin, for ``environment.json``.

    Raises:
        PraError: as :func:`pra.load`; or the models differ in more than their classes, captions and the second head.
    """
    folder = weights.model_folder(path, average)
    other = weights.load(folder, average)
    expected = replace(other.config, num_classes=model.config.num_classes)
    if model.config.has_shortcut and expected.autoregressive:
        guided = (other if other.config.has_shortcut else model).config.shortcut_guidance
        expected = replace(expected, head=replace(expected.head, shortcut=True, shortcut_guidance=guided))
    if expected.text is None and expected.autoregressive:
        expected = replace(expected, text=model.config.text)
    changed = differences(to_dict(expected), to_dict(model.config), "model")
    if changed:
        differing = "; ".join(changed).replace(" in the run, ", " there, ")
        problem = (
            f"the weights of {path} are of another model ({differing}), to whose size pictures are scaled. "
            "Leave such settings out, or train from scratch, without --from"
        )
        raise PraError(problem, code="mismatch", path=path, differences=differing)
    reader = {name: own for name, own in model.state_dict().items() if name.startswith("condition.")}
    tensors = reader | with_classes(other, model.classes)
    if model.config.has_shortcut and not other.config.has_shortcut:
        for name, own in model.state_dict().items():
            if name.startswith(("shortcut.span_in.2.", "shortcut.scale_in.2.")):
                tensors[name] = torch.zeros_like(own)  # the second head computes what the first does
            elif name.startswith("shortcut."):
                tensors[name] = tensors.get(name.replace("shortcut.", "head.", 1), own)
    model.load_state_dict(tensors)
    file = folder / weights.weights_name(folder, average)
    return {"from": path, "weights": os.path.abspath(file), "sha256": file_sha256(file)}


@torch.no_grad()
def with_classes(model: Model, classes: Sequence[str]) -> dict[str, Tensor]:
    """Return a model's tensors for another set of classes; only the class embedding changes.

    A class that the model knows by name keeps its embedding. A new class begins with the null class's, which class
    dropout has trained as the mixture of all classes: a condition that every layer knows, unlike a random row. So
    guidance, which follows the difference between the two, begins at zero.
    """
    rows = model.condition.rows_for(model.classes, classes)
    tensors = model.state_dict()
    return {name: tensor[rows] if name == EMBEDDING else tensor for name, tensor in tensors.items()}
