"""Short trainings, and their weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pra
from pra.config import apply_settings
from pra.method import noise
from pra.method.objectives import LossTerm, training_losses
from pra.models.weights import checkpoints
from pra.training import callbacks
from pra.training.run import read_metrics


def tiny(*settings, recipe="tiny"):
    """Two steps, each logged, without pictures, unless the settings change that."""
    usual = ("train.steps=2", "train.log_every=1", "train.sample_every=0")
    return apply_settings(pra.recipe(recipe), [*usual, *settings])


def train(config, folder, **more):
    """Train without curves, which take longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "draw_curves", lambda run: None)
        return pra.train(config, folder, device="cpu", progress=False, **more)


def tensors(run, step=None):
    """Every tensor of a checkpoint, by default of the newest: model, averages and optimizer."""
    folder = checkpoints(run)[-1] if step is None else run / "checkpoints" / f"step-{step:08d}"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one, other, step=None):
    """Bitwise."""
    expected, found = tensors(one, step), tensors(other, step)
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def steps_logged(run):
    return [int(row["step"]) for row in read_metrics(run)]


def pictures(folder, classes="ababab", size=(8, 8), mode="L"):
    """The name of a folder with a picture of noise for each name of a class (a letter, say)."""
    for number, name in enumerate(classes):
        path = folder / name / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(values).convert(mode).save(path)
    return f"folder:{folder}"


def changed_losses(change):
    """Replace ``losses_of``: ``change`` gets the number of the call, from 1, and the losses."""
    calls = [0]

    def losses(*arguments):
        calls[0] += 1
        return change(calls[0], training_losses(*arguments))

    return lambda model: losses


def edges(known):
    """Penalise the decoded pixels, with a random direction of every image."""
    assert known.decoded is not None
    direction = noise.normal(noise.fold(known.keys, 99), known.decoded.shape[-1])
    return ((known.decoded - known.patches) * direction.unsqueeze(1)).square().mean()


def smooth(known):
    """A term of models with conditions only."""
    return None if known.conditions is None else known.conditions.float().square().mean()


TERMS = {"edges": (0.5, edges), "smooth": LossTerm(0.01, smooth)}
"""A user's terms of the loss."""
