"""The engine equals the plain path at every position, under every setting; solvers and grids; what sampling costs."""

import copy
import gc
import json
import math
import threading
import weakref
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from naive import sample_without_caches
from support.engines import by_modules, in_buckets
from support.models import ALL, LEARNED, PIXEL_X, batch, random_jit, random_model
from test_solvers import gaussian_velocity

from pra import PraError, Sampler, cli, load
from pra.bench.device import Peak
from pra.bench.sampling import bench, count
from pra.config import GuidanceSchedule, Precision, SamplingConfig, Solver, TimeGrid, from_dict, to_dict
from pra.evaluation import flops
from pra.method import noise
from pra.models.cache import StaticCache
from pra.sampling import Engine, generate, guidance, runner, solvers
from pra.sampling.native import SWITCH, library
from pra.utils import device
from pra.utils.pixels import to_uint8
from studies.measures import Quality

LABELS, SEEDS = [0, 4, 2], [10, 11, 12]
GUIDED = SamplingConfig(guidance=3.0, steps=2)
SETTINGS = {
    "plain": SamplingConfig(solver=Solver.ADAMS_BASHFORTH, steps=4),
    "guided": replace(GUIDED, solver=Solver.DPM, steps=5, time_grid=TimeGrid.COSINE),
    "linear": replace(GUIDED, schedule=GuidanceSchedule.LINEAR, time_grid=TimeGrid.LOGIT_NORMAL, shift=2.0),
    "interval": replace(GUIDED, steps=4, guidance_interval=(0.2, 0.7)),
    "sde": replace(GUIDED, solver=Solver.EULER_MARUYAMA, steps=3, guidance_interval=(0.0, 0.4)),
}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def walk(model, config, prefix=None, precision=Precision.FLOAT32):
    """The engine's token at every position, and where its state began."""
    size = model.config
    engine = Engine(model, config, 3, precision)
    starts = noise.normal(noise.keys(1, torch.tensor(SEEDS)), size.num_patches, size.state_dim)
    prefix = torch.zeros(3, 0, size.patch_dim) if prefix is None else prefix
    with engine.arithmetic():
        for token in generate(engine.steps, torch.tensor(LABELS), starts, prefix):
            tensors = (token.h, token.state, token.patch)
            yield token.position, starts[:, token.position].unsqueeze(1), *(tensor.clone() for tensor in tensors)


@pytest.mark.parametrize(("bucket", "native"), [(1, "1"), (1, "0"), (5, "0"), (None, "0")])
@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_engine_equals_parallel_modules_at_every_position(name, kept, bucket, native, monkeypatch):
    """Fed the engine's own states and patches, the modules give its next ones, everything in parallel."""
    monkeypatch.setenv(SWITCH, native)
    if bucket != 1:
        in_buckets(monkeypatch, bucket)
    model, labels = random_model(ALL[name]), torch.tensor(LABELS)
    patches = model.patchify(batch(model.config)[0])[:, :kept]
    null = model.condition.null_like(labels)
    clean = model.clean_conditions(labels, model.patchify(batch(model.config)[0]))
    states = model.codec.encode(patches, None if clean is None else clean[:, :kept])
    times = solvers.uniform_grid(2, torch.zeros(1, 1))
    for _, start, h, state, patch in walk(model, GUIDED, patches):
        expected = torch.cat([model.conditions(one, patches)[:, -1:] for one in (labels, null)])
        close(h, expected)
        condition = model.head.project(expected)

        def velocity(z, t, condition=condition):
            conditional, unconditional = model.head(z.repeat(2, 1, 1), t, condition).chunk(2)
            return unconditional + 3.0 * (conditional - unconditional)

        drawn = solvers.midpoint(velocity, start, times, solvers.no_noise)
        close(state, model.codec.normalise(drawn), 1e-4)
        states, patches = torch.cat([states, state], dim=1), torch.cat([patches, patch], dim=1)
        close(patch, model.write(states)[:, -1:])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["learned", "pixel-x"])
def test_solvers_grids_and_intervals_equal_the_formulas(name, settings):
    model, config = random_model(ALL[name]), SETTINGS[settings]
    images = Sampler(model, config).sample(LABELS, SEEDS)
    close(images, sample_without_caches(model, config, LABELS, SEEDS), 1e-3)


def test_work_run_twice_gives_the_same_images(monkeypatch):
    """As it is when a graph is captured: warm-ups and capture come before the run that counts."""
    model = random_model()
    by_modules(monkeypatch)
    once = Sampler(model, SETTINGS["guided"]).sample(LABELS, SEEDS)

    def twice(work, key, *inputs):
        work(*inputs)
        return work(*inputs)

    monkeypatch.setattr(runner, "runner", lambda device, compile: twice)
    assert torch.equal(Sampler(model, SETTINGS["guided"]).sample(LABELS, SEEDS), once)


def test_modulations_may_be_made_in_any_number_of_groups(monkeypatch):
    plan = guidance.Plan(SETTINGS["interval"], 12, [0.0, 0.1, 0.3, 0.4, 0.5, 0.9])
    assert plan.streams(True) == (1, 1, 2, 2, 2, 1)
    assert list(plan.groups(True, 3)) == [(0, 2, 1), (2, 5, 2), (5, 6, 1)]
    assert list(plan.groups(False, 3)) == [(0, 6, 1)]
    model = random_model()
    together = Sampler(model, SETTINGS["interval"]).sample(LABELS, SEEDS)
    monkeypatch.setattr(guidance, "MODULATED_ROWS", 12)
    assert list(plan.groups(True, 3)) == [(0, 2, 1), (2, 4, 2), (4, 5, 2), (5, 6, 1)]
    close(Sampler(model, SETTINGS["interval"]).sample(LABELS, SEEDS), together)


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_a_sampler_follows_weights_that_change(precision):
    """In place, as training changes them, and in new memory."""
    model, other = random_model(), random_model(num_classes=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    sampler = Sampler(model, GUIDED, precision)
    before = sampler.sample(LABELS, SEEDS)
    expected = Sampler(copy.deepcopy(other), GUIDED, precision).sample(LABELS, SEEDS)
    assert (expected - before).abs().max() > 0.01
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(other.state_dict())
    assert torch.equal(sampler.sample(LABELS, SEEDS), expected)
    model.load_state_dict(kept, assign=True)
    assert torch.equal(sampler.sample(LABELS, SEEDS), before)


def test_streams_of_one_sampler_do_not_meet():
    sampler = Sampler(random_model(), GUIDED)
    whole = [sampler.sample(LABELS, seeds) for seeds in (SEEDS, [1, 2, 3])]
    mixed = list(zip(sampler.stream(LABELS, SEEDS), sampler.stream(LABELS, [1, 2, 3]), strict=True))
    assert [torch.equal(a, b) for a, b in zip(mixed[-1], whole, strict=True)] == [True, True]
    abandoned = sampler.stream(LABELS, [7, 8, 9])
    next(abandoned)
    abandoned.close()
    assert torch.equal(sampler.sample(LABELS, SEEDS), whole[0])


def test_images_belong_to_the_caller():
    """Ordinary tensors: a gradient may start at them, and the next batch does not touch them."""
    sampler = Sampler(random_model(), GUIDED)
    images = sampler.sample(LABELS, SEEDS)
    before = images.clone()
    sampler.sample(LABELS, [1, 2, 3])
    assert torch.equal(images, before)
    images.requires_grad_().square().sum().backward()
    assert images.grad is not None


def test_a_batch_too_large_is_made_in_parts(monkeypatch):
    model = random_model()
    images, _, _ = batch(model.config, 5)
    labels, seeds = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    sampler = Sampler(model, GUIDED)
    whole, continued = sampler.sample(labels, seeds), sampler.complete(images, 1, labels, seeds)
    sizes = []
    monkeypatch.setattr("pra.sampling.sampler.budget", lambda device: 2.5 * 18_000)
    monkeypatch.setattr("pra.sampling.sampler.cache_bytes", lambda *_: 18_000)
    monkeypatch.setattr("pra.sampling.sampler.Engine", lambda *a: (sizes.append(a[2]), Engine(*a))[1])
    close(sampler.sample(labels, seeds), whole)
    assert set(sizes) <= {1, 2}
    close(sampler.complete(images, 1, labels, seeds), continued)
    assert torch.equal(sampler.complete(images, 3, labels, seeds), images)


def test_the_size_of_parts_is_settled_once_and_one_engine_makes_them_all(monkeypatch):
    """On a device whose free memory is less by what an idle engine holds."""
    sampler, made = Sampler(random_model(), GUIDED), []

    class Counted(Engine):
        def __init__(self, *arguments):
            made.append(arguments[2])
            assert not sampler.idle  # that memory is to be had
            super().__init__(*arguments)

    labels, seeds = [0, 1, 2, 3, 4, 0, 1, 2], list(range(8))
    whole = sampler.sample(labels, seeds)
    continued = sampler.complete(whole, 1, labels, seeds)
    monkeypatch.setattr("pra.sampling.sampler.Engine", Counted)
    monkeypatch.setattr("pra.sampling.sampler.budget", lambda device: 3.5 - len(sampler.idle))
    monkeypatch.setattr("pra.sampling.sampler.cache_bytes", lambda *_: 1)
    sampler.idle, sampler.fits = {}, None
    for _ in range(2):
        close(sampler.sample(labels, seeds), whole)
        close(sampler.complete(whole, 1, labels, seeds), continued)
    assert made == [3]
    sampler.sample(labels[:2], seeds[:2])
    assert made == [3, 2]


def test_only_the_finished_pictures_are_copied(monkeypatch):
    model, rows = random_model(), []
    monkeypatch.setattr(model, "unpatchify", lambda p: (rows.append(p.shape[1]), type(model).unpatchify(model, p))[1])
    sampler = Sampler(model, GUIDED)
    images = sampler.sample(LABELS, SEEDS)
    sampler.complete(images, 1, LABELS, SEEDS)
    assert rows == [12, 12]
    list(sampler.stream(LABELS, SEEDS))
    assert rows[2:] == [4, 8, 12]


@pytest.mark.parametrize("compile", [False, True])
def test_an_engine_is_freed_as_soon_as_it_is_dropped(compile, monkeypatch):
    """Without waiting for Python to look for cycles: it holds gigabytes."""
    monkeypatch.setattr(runner, "compiled", lambda function, what, without: function)
    sampler = Sampler(random_model(), GUIDED, compile=compile)
    sampler.sample(LABELS, SEEDS)
    engine = weakref.ref(sampler.idle[3])
    gc.collect()
    gc.disable()
    try:
        assert engine() is not None
        sampler.idle = {}
        assert engine() is None
    finally:
        gc.enable()


class FakeCuda:
    """What of torch.cuda a capture asks, and the inner runner; a graph repeats what was run while it was captured."""

    def __init__(self, monkeypatch):
        self.now, self.seen = {"device": 0, "stream": "default", "mode": None, "graph": None}, []
        for name in ("device", "stream", "graph", "Stream", "CUDAGraph", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def __call__(self, work, key, *inputs):
        self.seen.append(dict(self.now))
        output = work(*inputs)
        if self.now["graph"] is not None:
            self.now["graph"].captured.append(lambda: output.copy_(work(*inputs)))
        return output

    @contextmanager
    def within(self, **state):
        before = dict(self.now)
        self.now.update(state)
        yield
        self.now.update(before)

    def device(self, device):
        return self.within(device=device.index)

    def stream(self, stream):
        return self.within(stream=stream)

    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        return self.within(graph=graph, stream=stream, mode=capture_error_mode)

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def __init__(self):
            self.captured = []

        def replay(self):
            for work in self.captured:
                work()

    def current_stream(self):
        return self.Stream()

    def graph_pool_handle(self):
        return 1


def test_a_capture_is_of_its_own_device_one_stream_and_one_thread(monkeypatch):
    cuda, device, done = FakeCuda(monkeypatch), torch.device("cuda", 1), []

    def work(x, nothing):
        assert nothing is None
        done.append((int(x), cuda.now["device"]))
        return 2 * x

    run = runner.CudaGraphs(cuda, device)
    results = [int(run(work, key, torch.tensor(number), None)) for key, number in ((4, 1), (4, 2), (8, 3))]
    assert results == [2, 4, 6]
    once = runner.WARM_UPS + 1  # and a replay
    assert done == [*[(1, 1)] * (once + 1), (2, 1), *[(3, 1)] * (once + 1)]
    assert [seen["mode"] for seen in cuda.seen] == [*[None] * runner.WARM_UPS, "thread_local"] * 2
    (stream,) = {seen["stream"] for seen in cuda.seen}
    assert stream.device == device
    assert cuda.now["device"] == 0


BUCKET = 4
"""Tokens by which a captured view grows in these tests: the tiny model's caches lie below what it is in use."""


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(runner, "BUCKET", BUCKET)


def views(engine, whole):
    """Whether every view of the backbone's cache was captured: the whole alone, or growing ones."""
    cache = engine.steps.backbone_cache.capacity
    assert cache > 3 * BUCKET
    captured = {bound for name, bound in engine.steps.run.graphs if name == "read"}
    return captured == ({cache} if whole else {*range(BUCKET, cache, BUCKET), cache})


@pytest.mark.parametrize("bucket", [BUCKET, None])
@pytest.mark.parametrize("settings", SETTINGS)
def test_captured_and_replayed_the_images_are_the_same(settings, bucket, monkeypatch, small_buckets):
    """All but CUDA itself."""
    model = random_model()
    images, _, _ = batch(model.config, 3)

    def made(sampler):
        asked = [(LABELS, seeds) for seeds in (SEEDS, [1, 2, 3], SEEDS)]
        return [(sampler.sample(*one), sampler.complete(images, 2, *one)) for one in asked]

    expected, cuda = made(Sampler(model, SETTINGS[settings])), FakeCuda(monkeypatch)
    in_buckets(monkeypatch, bucket)
    monkeypatch.setattr(runner, "runner", lambda device, compile: runner.CudaGraphs(cuda, device))
    sampler = Sampler(model, SETTINGS[settings])
    close(made(sampler), expected, 1e-3)
    assert views(sampler.idle[3], whole=bucket is None)


def test_compiled_graphs_look_at_the_whole_cache(monkeypatch):
    """Each bucket would be compiled anew."""
    FakeCuda(monkeypatch)
    monkeypatch.setattr(device, "_has_bfloat16", lambda device: True)
    model = random_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    by_modules(monkeypatch)
    for compile, bucket in ((True, None), (False, runner.BUCKET)):
        way = runner.way_for(model, Precision.AUTO, compile)
        assert (way.cache.func, way.cache.keywords, way.low) == (StaticCache, {"bucket": bucket}, True)
    assert isinstance(runner.runner(torch.device("cuda", 0), True).inner, runner.Compiled)


def test_a_model_may_move_after_its_sampler_is_made():
    model = random_model().to("meta")
    sampler = Sampler(model, GUIDED)
    assert sampler.device.type == "meta"
    sampler.model = random_model()
    assert sampler.device.type == "cpu"
    assert sampler.sample(LABELS, SEEDS).isfinite().all()


@pytest.mark.parametrize("has", [True, False])
def test_precision_is_bfloat16_of_itself_only_where_the_gpu_has_it(has, monkeypatch):
    FakeCuda(monkeypatch)
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or has
    )
    device._has_bfloat16.cache_clear()
    gpu = torch.device("cuda", 0)
    assert device.in_bfloat16(gpu, Precision.AUTO) is has
    assert device.in_bfloat16(gpu, Precision.BFLOAT16)
    assert not device.in_bfloat16(gpu, Precision.FLOAT32)
    assert not device.in_bfloat16(torch.device("cpu"), Precision.AUTO)
    assert asked == [False]
    device._has_bfloat16.cache_clear()


def test_a_gpu_named_by_its_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda", "cpu", "cuda:1"):
        assert device.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda", 1)]


def test_a_failed_batch_leaves_nothing_behind(monkeypatch):
    """A mask is added to scores, values are multiplied by 0: neither makes anything of what is not finite."""
    in_buckets(monkeypatch, None)
    model = random_model()
    sampler = Sampler(model, GUIDED)
    images = sampler.sample(LABELS, SEEDS)
    engine = sampler.idle[3]
    with torch.inference_mode():
        for cache in engine.steps.caches:
            cache.keys.fill_(float("nan"))
            cache.values.fill_(float("nan"))
    assert torch.equal(sampler.sample(LABELS, SEEDS), images)


@pytest.mark.parametrize("compiled", [True, False])
def test_bfloat16_products_leave_the_state_float32(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setenv(SWITCH, "0")
    model = random_model()
    exact = list(walk(model, GUIDED))
    for (*_, h, _, patch), (_, _, rounded, state, written) in zip(
        exact[:1], walk(model, GUIDED, precision=Precision.BFLOAT16), strict=False
    ):
        assert state.dtype is written.dtype is torch.float32
        assert 0 < (rounded - h).abs().max() < 0.1
        assert (written - patch).abs().max() < 0.2
    expected = torch.float32 if compiled and library() else torch.bfloat16
    assert Engine(model, GUIDED, 1, Precision.BFLOAT16).steps.backbone_cache.keys.dtype is expected


# --- guidance interval --------------------------------------------------------------------------------------


def test_no_unconditional_work_where_the_scale_is_one():
    costs = {
        interval: flops.sampling_costs(LEARNED, replace(GUIDED, steps=4, guidance_interval=interval))
        for interval in ((0.0, 1.0), (0.2, 0.7), (0.99, 1.0))
    }
    alone = flops.sampling_costs(LEARNED, SamplingConfig(steps=4))
    assert costs[0.99, 1.0] == alone
    assert alone["head"].flops < costs[0.2, 0.7]["head"].flops < costs[0.0, 1.0]["head"].flops
    linear = flops.sampling_costs(LEARNED, replace(GUIDED, steps=4, schedule=GuidanceSchedule.LINEAR))
    assert linear["head"].flops < costs[0.0, 1.0]["head"].flops  # the first position's scale is 1


def test_an_interval_that_holds_no_evaluation_is_no_guidance():
    model = random_model()
    unguided = Sampler(model, SamplingConfig(steps=2)).sample(LABELS, SEEDS)
    nowhere = Sampler(model, replace(GUIDED, guidance_interval=(0.99, 1.0))).sample(LABELS, SEEDS)
    assert torch.equal(nowhere, unguided)
    jit = random_jit()
    unguided = Sampler(jit, SamplingConfig(steps=2)).sample(LABELS, SEEDS)
    assert torch.equal(Sampler(jit, replace(GUIDED, guidance_interval=(0.99, 1.0))).sample(LABELS, SEEDS), unguided)
    guided = Sampler(jit, replace(GUIDED, guidance_interval=(0.0, 0.3))).sample(LABELS, SEEDS)
    assert not torch.allclose(guided, unguided, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must be two times .*got 0.5 and 0.2"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"guidance_interval": (math.nan, 1.0)}, "guidance_interval"),
        ({"shift": 0.0}, "shift must be positive"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(PraError, match=message):
        replace(SamplingConfig(), **change)


def test_old_settings_mean_what_they_meant():
    old = {"guidance": 1.5, "schedule": "constant", "solver": "heun", "steps": 4, "temperature": 1.0}
    config = from_dict(SamplingConfig, old)
    assert config == SamplingConfig(guidance=1.5, solver=Solver.HEUN, steps=4)
    assert torch.equal(solvers.time_grid(config.time_grid, 7, config.shift), torch.linspace(0, 1, 8))
    assert from_dict(SamplingConfig, json.loads(json.dumps(to_dict(SETTINGS["interval"])))) == SETTINGS["interval"]


# --- solvers and grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [TimeGrid.UNIFORM, TimeGrid.COSINE])
@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("solver", [Solver.ADAMS_BASHFORTH, Solver.DPM])
def test_multistep_solvers_are_of_second_order(solver, numbers, grid):
    """On the exact field from N(0, 1) to N(2, 1/4), whose path from z ends at 2 + z / 2."""
    start = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
    field, errors = gaussian_velocity(2.0, 0.5), []
    for steps in (80, 160, 320):
        times = solvers.time_grid(grid, steps).double()
        if numbers:
            times = times.tolist()
        z = solvers.INTEGRATORS[solver](lambda z, t: field(z, torch.as_tensor(t)), start, times, solvers.no_noise)
        errors.append((z - (2 + start / 2)).abs().max())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.35)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("grid", list(TimeGrid))
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_grids_rise_from_noise_to_data(grid, steps, shift):
    times = solvers.time_grid(grid, steps, shift)
    assert times.shape == (steps + 1,)
    assert times[0] == 0
    assert times[-1] == 1
    assert (times.diff() > 0).all()


def test_grids_put_their_intervals_where_they_say():
    def widths(grid, shift=1.0):
        return solvers.time_grid(grid, 8, shift).diff()

    cosine, logit = widths(TimeGrid.COSINE), widths(TimeGrid.LOGIT_NORMAL)
    assert cosine.argsort().tolist()[:2] in ([0, 7], [7, 0])
    assert logit.argsort().tolist()[-2:] in ([0, 7], [7, 0])
    assert logit.argsort().tolist()[:2] in ([3, 4], [4, 3])
    # P(sigmoid(x) < t) = 1/4 at t = sigmoid(-0.6745)
    assert solvers.time_grid(TimeGrid.LOGIT_NORMAL, 4)[1].item() == pytest.approx(1 / (1 + math.exp(0.67449)), abs=1e-5)
    assert widths(TimeGrid.UNIFORM, 3.0).argmin() == 0
    assert widths(TimeGrid.UNIFORM, 0.5).argmin() == 7
    # SD3's shift: a noise of 1/2 becomes 3/4 at shift 3.
    assert solvers.time_grid(TimeGrid.UNIFORM, 2, 3.0)[1].item() == pytest.approx(0.25)


def test_the_times_that_solvers_ask_at():
    assert solvers.evaluation_times(Solver.MIDPOINT, [0.0, 0.5, 1.0]) == [0.0, 0.25, 0.5, 0.75]
    assert solvers.evaluation_times(Solver.HEUN, [0.0, 1.0]) == [0.0, 1.0]
    for solver in (Solver.EULER, Solver.EULER_MARUYAMA, Solver.ADAMS_BASHFORTH, Solver.DPM):
        assert solvers.evaluation_times(solver, [0.0, 0.4, 1.0]) == [0.0, 0.4]


def test_studies_tell_grids_apart():
    keys = {Quality(config, 10).key for config in SETTINGS.values()}
    changes = ({}, {"shift": 2.0}, {"guidance_interval": (0.1, 1.0)})
    keys |= {Quality(replace(GUIDED, **change), 10).key for change in changes}
    assert len(keys) == len(SETTINGS) + 3
    assert Quality(GUIDED, 10).key == "guidance=3 midpoint-2 10 images"  # as before there were grids


# --- what it costs ------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """Matrices as often as they are read, and the caches."""
    config, sampling = replace(PIXEL_X, class_tokens=3), SamplingConfig(solver=Solver.EULER, steps=5)
    model, patches = random_model(config), 12
    named = model.backbone.named_parameters()
    matrices = sum(p.numel() for name, p in named if name.endswith("weight") and p.ndim == 2)
    cached = sum(3 + 1 + i + 1 for i in range(patches - 1)) * 2 * 2 * 32
    head = sum(p.numel() for name, p in model.head.named_parameters() if p.ndim == 2 and "time_in" not in name)
    modulations = sum(m.weight.numel() for m in (*model.head.modulations, model.head.final_modulation))
    condition = model.head.condition_in.weight.numel()
    costs = flops.sampling_costs(config, sampling)
    assert costs["backbone"].bytes == 4 * (patches * matrices + cached)
    assert costs["head"].bytes == 4 * patches * (5 * (head - modulations - condition) + modulations + condition)
    assert costs["decoder"].bytes == 0
    lower = flops.sampling_costs(config, sampling, batch=8, element_size=2)
    assert lower["backbone"].bytes == pytest.approx(2 * (patches * matrices / 8 + cached))
    times = 5 * 2 * sum(p.numel() for name, p in model.head.named_parameters() if p.ndim == 2 and "time_in" in name)
    assert costs["head"].flops - lower["head"].flops == times * 7 // 8  # embedded once for all images


def test_the_floor_and_the_measured_time_of_every_part():
    peak = Peak(flops=2e9, bytes=1e9)
    rows = bench(random_model(), GUIDED, [1, 2], Precision.AUTO, False, peak)
    assert [(row.batch, row.part) for row in rows] == [
        (size, part) for size in (1, 2) for part in ("backbone", "head", "decoder", "image")
    ]
    counted = count(LEARNED, GUIDED, [1, 2], 4, peak)
    for row, same in zip(rows, counted, strict=True):
        assert replace(row, measured=None) == same
        assert row.measured > 0
    for row in counted[:3]:
        assert row.floor == max(row.flops / 2e9, row.bytes / 1e9)
    assert counted[3].floor == pytest.approx(sum(row.floor for row in counted[:3]))


def test_the_command_counts(tmp_path, capsys):
    out = tmp_path / "figures.json"
    words = ["bench", "sample", "fashion", "--batch", "1,256", "--counts", "--precision", "bfloat16"]
    assert cli.main([*words, "--set", "steps=25", "--set", "solver=euler", "--tflops", "790", "--bandwidth", "4.3",
                     "--out", str(out)]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "790 TFLOP/s and 4.3 TB/s" in text
    written = json.loads(out.read_text())
    assert [row["batch"] for row in written["rows"]] == [1] * 4 + [256] * 4
    assert written["sampling"]["steps"] == 25
    alone, crowd = written["rows"][3], written["rows"][7]
    assert crowd["flops"] == pytest.approx(alone["flops"], rel=0.01)
    assert crowd["bytes"] < alone["bytes"] / 10


def test_the_command_measures_a_run(run, capsys):
    assert cli.main(["bench", "sample", str(run), "--batch", "2", "--tflops", "0.1", "--bandwidth", "0.01",
                     "--device", "cpu"]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["backbone", "head", "decoder", "image"]
    assert all(line.endswith(" %") for line in lines[2:])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["samples", "tiny"], ["no command 'bench samples'; did you mean 'sample'?"]),
        (["sample", "fashoin"], ["fashoin", "did you mean 'fashion'?"]),
        (["sample", "tiny", "--batch", "0"], ["--batch '0'", "lie in [1, 65536]"]),
        (["sample", "tiny", "--precision", "half"], ["--precision: 'half' is unknown"]),
        (["sample", "tiny", "--tflops", "3"], ["--tflops and --bandwidth belong together"]),
        (["sample", "tiny", "--set", "stepz=3"], ["stepz", "did you mean 'steps'?"]),
        (["sample", "tiny:jit"], ["tiny:jit is a JiT"]),
        (["sample", "tiny", "--out", "."], [". exists already; choose another file"]),
    ],
)
def test_the_command_refuses(words, parts, capsys):
    assert cli.main(["bench", *words, "--counts"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for part in parts:
        assert part in error


def test_the_options_reach_the_sampler(run, tmp_path, capsys):
    words = ["sample", str(run), "--labels", "3", "--seeds", "0", "--device", "cpu"]
    words += ["--guidance", "3", "--time-grid", "cosine", "--shift", "2", "--guidance-interval", "0.2, 0.9"]
    assert cli.main([*words, "--out", str(tmp_path / "one.npz")]) == 0
    model = load(run)
    changes = {"time_grid": TimeGrid.COSINE, "shift": 2.0, "guidance_interval": (0.2, 0.9)}
    expected = Sampler(model, replace(model.sampling, guidance=3.0, **changes)).sample([3], [0])
    assert (np.load(tmp_path / "one.npz")["arr_0"] == to_uint8(expected).permute(0, 2, 3, 1).numpy()).all()
    for text, part in (("0.9,0.2", "guidance_interval must be two times"), ("0.2", "needs two numbers, such as")):
        assert cli.main([*words, "--guidance-interval", text, "--out", str(tmp_path / "none.npz")]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "none.npz").exists()


# --- slower, or on other machines ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "pixel-x"])
def test_the_compiled_step_is_the_same(name):
    model = random_model(ALL[name])
    plain = Sampler(model, SETTINGS["interval"]).sample(LABELS, SEEDS)
    close(Sampler(model, SETTINGS["interval"], compile=True).sample(LABELS, SEEDS), plain, 1e-4)


@pytest.mark.slow
def test_compiled_step_notices_a_hook():
    model = random_model()
    sampler = Sampler(model, GUIDED, compile=True)
    before = sampler.sample(LABELS, SEEDS)
    model.head.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    after = sampler.sample(LABELS, SEEDS)
    assert not torch.allclose(after, before, atol=1e-3)
    close(after, Sampler(model, GUIDED).sample(LABELS, SEEDS), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("compile", [False, True])
def test_the_captured_step_is_the_same(settings, compile, small_buckets):
    """Captured in its first batch, replayed in the others; across weights that change, too."""
    model = random_model()
    expected = [Sampler(model, SETTINGS[settings]).sample(LABELS, seeds) for seeds in (SEEDS, [1, 2, 3])]
    sampler = Sampler(model.cuda(), SETTINGS[settings], Precision.FLOAT32, compile)
    for seeds, images in zip((SEEDS, [1, 2, 3], SEEDS), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(sampler.sample(LABELS, seeds).cpu(), images, atol=1e-2, rtol=1e-2)
    assert isinstance(sampler.idle[3].steps.run, runner.CudaGraphs)
    assert views(sampler.idle[3], whole=compile)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    changed = Sampler(copy.deepcopy(model), SETTINGS[settings], Precision.FLOAT32).sample(LABELS, SEEDS)
    torch.testing.assert_close(sampler.sample(LABELS, SEEDS), changed, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_captured_completions_are_the_same(small_buckets):
    model = random_model()
    images, _, _ = batch(model.config, 3)
    expected = [Sampler(model, GUIDED).complete(images, rows, LABELS, SEEDS) for rows in (1, 2)]
    sampler = Sampler(model.cuda(), GUIDED, Precision.FLOAT32)
    for rows in (1, 2, 1):
        continued = sampler.complete(images, rows, LABELS, SEEDS).cpu()
        assert torch.equal(continued[:, :, : 2 * rows], images[:, :, : 2 * rows])
        torch.testing.assert_close(continued, expected[rows - 1], atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_captured_bfloat16_stays_close(small_buckets):
    model = random_model().cuda()
    exact, rounded = (Sampler(model, GUIDED, p).sample(LABELS, SEEDS) for p in (Precision.FLOAT32, Precision.BFLOAT16))
    assert rounded.dtype is torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.02


@pytest.mark.gpu
def test_two_sizes_in_turn_and_parts_on_a_gpu(small_buckets):
    model = random_model()
    whole = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    sampler = Sampler(model.cuda(), GUIDED, Precision.FLOAT32)
    for size in (3, 2, 3, 2):
        images = sampler.sample(LABELS[:size], SEEDS[:size]).cpu()
        torch.testing.assert_close(images, whole[:size], atol=1e-2, rtol=1e-2)
    sampler.fits = sampler.device, 2
    torch.testing.assert_close(sampler.sample(LABELS, SEEDS).cpu(), whole, atol=1e-2, rtol=1e-2)
    assert list(sampler.idle) == [2]


@pytest.mark.gpu
def test_a_gpu_that_is_not_the_current_one(small_buckets):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = random_model()
    expected = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    sampler = Sampler(model, GUIDED, Precision.FLOAT32)
    for name in ("cuda:1", "cuda:0"):
        model.to(name)
        for _ in range(2):
            images = sampler.sample(LABELS, SEEDS)
            assert images.device == torch.device(name)
            torch.testing.assert_close(images.cpu(), expected, atol=1e-2, rtol=1e-2)
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_captures_while_another_thread_pins_memory(small_buckets):
    model = random_model()
    expected = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    model.cuda()
    over, pinned = threading.Event(), []

    def pin():
        while not over.is_set():
            pinned.append(len(torch.zeros(2**20 + len(pinned)).pin_memory()))  # another size: not from torch's store

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(3):
            images = Sampler(model, GUIDED, Precision.FLOAT32).sample(LABELS, SEEDS)
            torch.testing.assert_close(images.cpu(), expected, atol=1e-2, rtol=1e-2)
    finally:
        over.set()
        thread.join()
    assert pinned


@pytest.mark.gpu
def test_two_threads_capture_at_once(small_buckets):
    """As two visitors of the demo have it."""
    model = random_model()
    expected = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    sampler, made = Sampler(model.cuda(), GUIDED, Precision.FLOAT32), []
    threads = [threading.Thread(target=lambda: made.append(sampler.sample(LABELS, SEEDS).cpu())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    for images in made:
        torch.testing.assert_close(images, expected, atol=1e-2, rtol=1e-2)
