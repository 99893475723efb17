"""Training on one GPU, if there is one (``-m gpu``): bfloat16, DDP and FSDP2 over nccl, the compiler, resuming."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.training import tiny
from torch.distributed import HashStore

import pra
from pra.config import Precision
from pra.method import flow, noise
from pra.models import build_model
from pra.training.averages import build_averages
from pra.training.optimizer import whole
from pra.training.run import read_metrics
from pra.training.step import Step, shard
from pra.utils.device import autocast
from pra.utils.distributed import ALONE, World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:a state dimension varies little"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def step_of(run, world=ALONE):
    """The step of a model without zero weights, which would hide mistakes."""
    model, random = build_model(run.model, 0).to(DEVICE), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random).to(parameter.device)
    return Step(model, build_averages(model, run.train), run.train, DEVICE, world)


def passed(run, step):
    """Losses and gradients of a step, on the CPU."""
    random = torch.Generator().manual_seed(1)
    images = (torch.rand(8, 1, 8, 8, generator=random) * 2 - 1).to(DEVICE)
    labels = torch.arange(8, device=DEVICE)
    keys = noise.keys(0, labels)
    with autocast(DEVICE, run.train.precision):
        losses = step.loss(images, labels, keys, run.train.objective, run.train.rollout, None)
    losses.total.backward()
    gradients = {n: whole(p.grad).cpu() for n, p in step.model.named_parameters() if p.grad is not None}
    return {name: value.cpu() for name, value in losses.measured().items()}, gradients


def alone(run):
    """Train in one process, without the compiler."""
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, compile=False))
    return passed(run, step_of(run))


def assert_alike(found, expected, rtol):
    """Losses by their value, gradients by their distance."""
    assert found[0].keys() == expected[0].keys() == {"total", "pixel", "flow", "auxiliary", "state_std"}
    for name in found[0].keys() - {"state_std"}:
        torch.testing.assert_close(found[0][name], expected[0][name], rtol=rtol, atol=rtol)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        distance = (found[1][name] - gradient).norm()
        assert distance <= 5 * rtol * gradient.norm() + 1e-6, (name, float(distance), float(gradient.norm()))


def test_step_in_bfloat16_is_finite_and_near():
    exact = alone(tiny("train.precision=float32"))
    rough = alone(tiny("train.precision=bfloat16"))
    assert all(value.isfinite() for value in rough[0].values())
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in rough[1].values())
    assert_alike(rough, exact, 0.03)
    assert not torch.equal(rough[0]["total"], exact[0]["total"])


def test_dyadic_steps_do_not_wait_for_the_device():
    keys = noise.keys(0, torch.arange(8, device=DEVICE))
    torch.cuda.set_sync_debug_mode("error")
    try:
        t, span = flow.dyadic_steps(keys, 4, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = flow.dyadic_steps(keys.cpu(), 4, 100)
    assert torch.equal(t.cpu(), on_cpu[0])
    assert torch.equal(span.cpu(), on_cpu[1])


@pytest.mark.parametrize(
    ("settings", "several", "sharded", "rtol"),
    [
        (["train.precision=float32", "train.parallel=ddp"], True, False, 1e-5),
        (["train.precision=bfloat16", "train.parallel=ddp"], True, False, 1e-2),
        (["train.precision=float32"], False, True, 1e-5),
        (["train.precision=bfloat16"], False, True, 3e-2),
        (["train.precision=float32", "train.compile=true"], True, False, 1e-3),  # block by block
        (["train.precision=float32", "train.compile=true"], False, False, 1e-3),  # the whole loss
    ],
)
def test_shared_step_equals_that_of_one_process(group, settings, several, sharded, rtol):
    """Train by DDP and by FSDP; the compiler runs, and changes only rounding."""
    run = tiny(*settings)
    shared = step_of(run, World(0, 2) if several else ALONE)
    if sharded:
        average = shared.averages["ema"].model
        shard(shared.loss, [average], ALONE, DEVICE, run.train.precision is Precision.BFLOAT16)
    with shared.accumulating(last=True):
        found = passed(run, shared)
    assert {p.dtype for p in shared.model.parameters()} == {torch.float32}
    assert_alike(found, alone(run), rtol)
    assert shared.uncompiled is None


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_run_resumes_and_learns_as_on_the_cpu(tmp_path, compiled):
    """Runs are equal up to rounding, which AdamW's first steps enlarge."""
    settings = ("train.precision=float32", "train.checkpoint_every=3")
    for name, device, ends in (("cpu", "cpu", [6]), ("gpu", str(DEVICE), [6]), ("again", str(DEVICE), [3, 6])):
        for steps in ends:
            run = tiny(*settings, f"train.steps={steps}", *([f"train.compile={compiled}"] * (device != "cpu")))
            pra.train(run, tmp_path / name, device=device, progress=False)
    weights = [load_file(tmp_path / n / "checkpoints" / "step-00000006" / "ema.safetensors") for n in ("gpu", "again")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    for a, b in zip(read_metrics(tmp_path / "cpu"), read_metrics(tmp_path / "gpu"), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=0.01)
