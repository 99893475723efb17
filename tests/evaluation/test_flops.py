"""Counted arithmetic equals the arithmetic that runs."""

from dataclasses import replace

import pytest
import torch
from support.models import ALL, batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pra import Sampler, config, recipe
from pra.evaluation.flops import sampling_flops, training_flops
from pra.method.objectives import training_losses
from pra.models import PRA
from pra.sampling.native import SWITCH


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch):
    """Use torch alone: its counter does not see the compiled arithmetic."""
    monkeypatch.setenv(SWITCH, "0")


def run_of(model, rollout=config.Parallel(), **sampling):  # noqa: B008  frozen
    tiny, (height, width) = recipe("tiny"), sampling.pop("image_size", (4, 6))
    return replace(
        tiny,
        model=replace(model, image_size=(height * model.group[0], width * model.group[1])),
        train=replace(tiny.train, rollout=rollout),
        sampling=replace(tiny.sampling, **{"steps": 2, "times": None} | sampling),
    )


def measured(work):
    # The fused CPU kernel has no entry in torch's counter; the plain one does the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


GUIDED = {"guidance": 2.0}
TOLD = replace(ALL["learned"].head, shortcut=True, shortcut_guidance=4.0)
MODELS = ALL | {"guided-shortcut": replace(ALL["learned"], head=TOLD)}
SDE = {"guidance": 2.0, "solver": config.Solver.EULER_MARUYAMA, "steps": 3}


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        *((name, GUIDED) for name in ALL),
        ("learned", {"guidance": 1.0}),
        ("learned", {"image_size": (2, 4)}),  # two patches, the shortest raster
        ("pixel-x", SDE),
        ("learned", GUIDED | {"steps": 3, "raster_steps": (3, 1)}),
        ("guided-shortcut", GUIDED | {"solver": config.Solver.SHORTCUT}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sampling_counts_what_runs(name, sampling):
    run = run_of(MODELS[name], **sampling)
    parts = sampling_flops(run)
    assert sum(parts.values()) == measured(lambda: Sampler(PRA(run.model), run.sampling).sample([1], [2]))
    assert (parts["decoder"] == 0) == (run.model.codec is None)


@pytest.mark.parametrize(
    ("name", "rollout"),
    [
        *((name, config.Parallel()) for name in ALL),
        ("learned", config.Clean()),
        ("encoder-without-h", config.Exact(steps=1)),
    ],
    ids=str,
)
def test_training_counts_what_runs(name, rollout):
    run = run_of(ALL[name], rollout)
    images, labels, keys = batch(run.model, 1)

    def step():
        losses = training_losses(PRA(run.model), images, labels, keys, run.train.objective, rollout)
        torch.autograd.backward(losses.total)

    assert training_flops(run) == pytest.approx(measured(step), rel=0.02)
