"""The engine equals the plain path at every position, under every setting, compiled and captured too."""

import copy
import functools
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from naive import sample_without_caches
from support.engines import by_modules, in_buckets
from support.models import ALL, LEARNED, batch, random_jit, random_model

from pra import Sampler
from pra.config import SHORTCUT_STEPS, GuidanceSchedule, Precision, SamplingConfig, Solver, TimeGrid
from pra.method import noise
from pra.models.cache import StaticCache
from pra.sampling import Engine, generate, guidance, runner, solvers
from pra.sampling.native import SWITCH, library
from pra.utils import device
from studies.measures import Quality

LABELS, SEEDS = [0, 4, 2], [10, 11, 12]
GUIDED = SamplingConfig(guidance=3.0, steps=2)
SETTINGS = {
    "plain": SamplingConfig(),
    "guided": GUIDED,
    "free": SamplingConfig(guidance=0.5, renormalise=False, steps=1),
    "euler": replace(GUIDED, solver=Solver.EULER),
    "bashforth": SamplingConfig(solver=Solver.ADAMS_BASHFORTH, steps=4),
    "dpm": replace(GUIDED, solver=Solver.DPM, steps=5, time_grid=TimeGrid.COSINE),
    "heun": replace(GUIDED, solver=Solver.HEUN, time_grid=TimeGrid.LOGIT_NORMAL, shift=2.0),
    "linear": replace(GUIDED, schedule=GuidanceSchedule.LINEAR, time_grid=TimeGrid.LOGIT_NORMAL, shift=2.0),
    "interval": replace(GUIDED, steps=4, guidance_interval=(0.2, 0.7)),
    "sde": replace(GUIDED, solver=Solver.EULER_MARUYAMA, steps=4, temperature=0.8, guidance_interval=(0.0, 0.4)),
    "raster": replace(GUIDED, steps=3, raster_steps=(3, 1, 2)),
    "raster sde": replace(GUIDED, solver=Solver.EULER_MARUYAMA, steps=4, raster_steps=(4, 2, 1, 1, 1)),
    "shortcut-linear": SamplingConfig(guidance=3.0, solver=Solver.SHORTCUT, steps=2, schedule=GuidanceSchedule.LINEAR),
    "shortcut-raster": SamplingConfig(guidance=2.0, solver=Solver.SHORTCUT, steps=4, raster_steps=(4, 2, 1)),
    **{f"shortcut-{n}": SamplingConfig(guidance=2.0, solver=Solver.SHORTCUT, steps=n) for n in SHORTCUT_STEPS},
}
MODELS = ALL | {
    "shortcut": replace(LEARNED, head=replace(LEARNED.head, shortcut=True)),
    "guided-shortcut": replace(LEARNED, head=replace(LEARNED.head, shortcut=True, shortcut_guidance=4.0)),
}
PATHS = {
    "compiled": lambda monkeypatch: None,
    "modules": by_modules,
    "buckets": lambda monkeypatch: in_buckets(monkeypatch, 8),
    "whole cache": lambda monkeypatch: in_buckets(monkeypatch, None),
}
CASES = [
    *((name, settings, path) for name in ALL for settings in ("euler", "sde") for path in PATHS),
    *((name, settings, "compiled") for name in ("learned", "pixel-x") for settings in SETTINGS if "-" not in settings),
    *(("shortcut", f"shortcut-{n}", path) for n in (*SHORTCUT_STEPS, "raster") for path in ("compiled", "modules")),
    *(("learned", "raster", path) for path in PATHS),
    *(("guided-shortcut", f"shortcut-{how}", path) for how in ("1", "raster", "linear") for path in PATHS),
]


@functools.cache
def by_formulas(name, settings):
    return sample_without_caches(random_model(MODELS[name]), SETTINGS[settings], LABELS, SEEDS)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def walk(model, config, prefix=None, precision=Precision.FLOAT32):
    """The engine's token at every position, and where its state began."""
    size = model.config
    engine = Engine(model, config, 3, precision)
    starts = noise.normal(noise.keys(1, torch.tensor(SEEDS)), size.num_groups, size.group_state_dim)
    prefix = torch.zeros(3, 0, size.group_dim) if prefix is None else prefix
    with engine.arithmetic():
        for token in generate(engine.steps, torch.tensor(LABELS), starts, prefix):
            tensors = (token.h, token.state, token.patch)
            yield token.position, starts[:, token.position].unsqueeze(1), *(tensor.clone() for tensor in tensors)


@pytest.mark.parametrize(("bucket", "native", "kept"), [(1, "1", 0), (5, "0", 4)])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_engine_equals_parallel_modules(name, kept, bucket, native, monkeypatch):
    """The modules, run in parallel on the engine's own states and patches, give its next states and patches."""
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


@pytest.mark.parametrize(("name", "settings", "path"), dict.fromkeys(CASES))
def test_images_equal_the_formulas_on_every_path(name, settings, path, monkeypatch):
    """Cache parity through the whole sampler; in bfloat16 the images stay close."""
    PATHS[path](monkeypatch)
    model, expected = random_model(MODELS[name]), by_formulas(name, settings)
    close(Sampler(model, SETTINGS[settings]).sample(LABELS, SEEDS), expected, 1e-3)
    if settings == "euler":
        rounded = Sampler(model, SETTINGS[settings], Precision.BFLOAT16).sample(LABELS, SEEDS)
        assert rounded.dtype is torch.float32
        assert (rounded - expected).abs().mean() < 0.02


def test_modulations_take_any_number_of_groups(monkeypatch):
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
def test_sampler_follows_weights_that_change(precision):
    """Weights change in place, as in training, and in new memory."""
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
    # Images belong to the caller: a gradient may start at them, and later batches leave them as they are.
    assert torch.equal(mixed[-1][0], whole[0])
    whole[0].requires_grad_().square().sum().backward()
    assert whole[0].grad is not None


def test_one_engine_makes_all_parts_of_a_large_batch(monkeypatch):
    """The device's free memory is less by what an idle engine holds."""
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
        assert torch.equal(sampler.complete(whole, 3, labels, seeds), whole)
    assert made == [3]
    sampler.sample(labels[:2], seeds[:2])
    assert made == [3, 2]


def test_only_finished_pictures_are_copied(monkeypatch):
    model, rows = random_model(), []
    monkeypatch.setattr(model, "unpatchify", lambda p: (rows.append(p.shape[1]), type(model).unpatchify(model, p))[1])
    sampler = Sampler(model, GUIDED)
    images = sampler.sample(LABELS, SEEDS)
    sampler.complete(images, 1, LABELS, SEEDS)
    assert rows == [12, 12]
    list(sampler.stream(LABELS, SEEDS))
    assert rows[2:] == [4, 8, 12]


@pytest.mark.parametrize("compile", [False, True])
def test_dropped_engine_is_freed_at_once(compile, monkeypatch):
    """An engine holds gigabytes, so it must be freed without a run of the garbage collector."""
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
    """The part of torch.cuda that a capture asks, and the inner runner; a graph repeats what ran in its capture."""

    def __init__(self, monkeypatch):
        self.now, self.seen = {"device": 0, "stream": "default", "mode": None, "graph": None}, []
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: Mock(device=device))
        monkeypatch.setattr(torch.cuda, "device", lambda device: self.within(device=device.index))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.within(stream=stream))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)

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

    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        return self.within(graph=graph, stream=stream, mode=capture_error_mode)

    class CUDAGraph:
        def __init__(self):
            self.captured = []

        def replay(self):
            for work in self.captured:
                work()


def test_capture_has_one_device_stream_and_thread(monkeypatch):
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


@pytest.mark.parametrize(("settings", "bucket"), [("interval", BUCKET), ("sde", BUCKET), ("linear", None)])
def test_captured_and_replayed_images_are_the_same(settings, bucket, monkeypatch, small_buckets):
    """All but CUDA itself."""
    model = random_model()
    images, _, _ = batch(model.config, 3)

    def made(sampler):
        asked = [(LABELS, seeds) for seeds in (SEEDS, [1, 2, 3])]
        return [(sampler.sample(*one), sampler.complete(images, 2, *one)) for one in asked]

    expected, cuda = made(Sampler(model, SETTINGS[settings])), FakeCuda(monkeypatch)
    in_buckets(monkeypatch, bucket)
    monkeypatch.setattr(runner, "runner", lambda device, compile: runner.CudaGraphs(cuda, device))
    sampler = Sampler(model, SETTINGS[settings])
    close(made(sampler), expected, 1e-3)
    assert views(sampler.idle[3], whole=bucket is None)


def test_compiled_graphs_see_the_whole_cache(monkeypatch):
    """Each bucket would be compiled again."""
    FakeCuda(monkeypatch)
    monkeypatch.setattr(device, "_has_bfloat16", lambda device: True)
    model = random_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    by_modules(monkeypatch)
    for compile, bucket in ((True, None), (False, runner.BUCKET)):
        way = runner.way_for(model, Precision.AUTO, compile)
        assert (way.cache.func, way.cache.keywords, way.low) == (StaticCache, {"bucket": bucket}, True)
    assert isinstance(runner.runner(torch.device("cuda", 0), True).inner, runner.Compiled)


def test_failed_batch_leaves_nothing_behind(monkeypatch):
    """A mask is added to scores, values are multiplied by 0: neither makes anything of what is not finite."""
    in_buckets(monkeypatch, None)
    sampler = Sampler(random_model(), GUIDED)
    images = sampler.sample(LABELS, SEEDS)
    with torch.inference_mode():
        for cache in sampler.idle[3].steps.caches:
            cache.keys.fill_(float("nan"))
            cache.values.fill_(float("nan"))
    assert torch.equal(sampler.sample(LABELS, SEEDS), images)


@pytest.mark.parametrize("native", ["1", "0"])
def test_bfloat16_products_leave_the_state_float32(native, monkeypatch):
    monkeypatch.setenv(SWITCH, native)
    model = random_model()
    *_, h, _, patch = next(walk(model, GUIDED))
    *_, rounded, state, written = next(walk(model, GUIDED, precision=Precision.BFLOAT16))
    assert state.dtype is written.dtype is torch.float32
    assert 0 < (rounded - h).abs().max() < 0.1
    assert (written - patch).abs().max() < 0.2
    expected = torch.float32 if native == "1" and library() else torch.bfloat16
    assert Engine(model, GUIDED, 1, Precision.BFLOAT16).steps.backbone_cache.keys.dtype is expected


@pytest.mark.parametrize("make", [random_model, random_jit])
def test_interval_without_evaluations_is_no_guidance(make):
    model = make()
    unguided = Sampler(model, SamplingConfig(steps=2)).sample(LABELS, SEEDS)
    nowhere = Sampler(model, replace(GUIDED, guidance_interval=(0.99, 1.0))).sample(LABELS, SEEDS)
    assert torch.equal(nowhere, unguided)
    guided = Sampler(model, replace(GUIDED, guidance_interval=(0.0, 0.3))).sample(LABELS, SEEDS)
    assert not torch.allclose(guided, unguided, atol=1e-3)


def test_studies_tell_grids_apart():
    changed = replace(GUIDED, shift=2.0), replace(GUIDED, guidance_interval=(0.1, 1.0))
    keys = {Quality(config, 10).key for config in (*SETTINGS.values(), *changed)}
    assert len(keys) == len(SETTINGS) + 2
    assert Quality(GUIDED, 10).key == "guidance=3 midpoint-2 10 images"  # as before there were grids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "pixel-x"])
def test_compiled_step_is_the_same_and_notices_a_hook(name):
    model = random_model(ALL[name])
    sampler = Sampler(model, SETTINGS["interval"], compile=True)
    close(sampler.sample(LABELS, SEEDS), by_formulas(name, "interval"), 1e-3)
    model.head.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    hooked = Sampler(model, SETTINGS["interval"]).sample(LABELS, SEEDS)
    assert not torch.allclose(hooked, by_formulas(name, "interval"), atol=1e-3)
    close(sampler.sample(LABELS, SEEDS), hooked, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", ["bashforth", "dpm", "linear", "interval", "sde"])
@pytest.mark.parametrize("compile", [False, True])
def test_captured_step_is_the_same(settings, compile, small_buckets):
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
def test_completions_precisions_and_parts_on_a_gpu(small_buckets):
    model = random_model()
    images, _, _ = batch(model.config, 3)
    expected = [Sampler(model, GUIDED).complete(images, rows, LABELS, SEEDS) for rows in (1, 2)]
    whole = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    sampler = Sampler(model.cuda(), GUIDED, Precision.FLOAT32)
    for rows in (1, 2, 1):
        continued = sampler.complete(images, rows, LABELS, SEEDS).cpu()
        assert torch.equal(continued[:, :, : 2 * rows], images[:, :, : 2 * rows])
        torch.testing.assert_close(continued, expected[rows - 1], atol=1e-2, rtol=1e-2)
    for size in (3, 2, 3, 2):
        made = sampler.sample(LABELS[:size], SEEDS[:size]).cpu()
        torch.testing.assert_close(made, whole[:size], atol=1e-2, rtol=1e-2)
    rounded = Sampler(model, GUIDED, Precision.BFLOAT16).sample(LABELS, SEEDS)
    assert rounded.dtype is torch.float32
    assert 0 < (rounded.cpu() - whole).abs().mean() < 0.02
    sampler.fits = sampler.device, 2
    torch.testing.assert_close(sampler.sample(LABELS, SEEDS).cpu(), whole, atol=1e-2, rtol=1e-2)
    assert list(sampler.idle) == [2]


@pytest.mark.gpu
def test_captures_of_two_threads_while_another_pins_memory(small_buckets):
    """Sample in threads, as visitors of the demo and data loaders have it."""
    model = random_model()
    expected = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    sampler, over = Sampler(model.cuda(), GUIDED, Precision.FLOAT32), threading.Event()

    def pin():
        for size in itertools.count(2**20):  # another size each time: not from torch's store
            torch.zeros(size).pin_memory()
            if over.is_set():
                return

    with ThreadPoolExecutor() as threads:
        pinning = threads.submit(pin)
        work = [threads.submit(lambda: sampler.sample(LABELS, SEEDS).cpu()) for _ in range(2)]
        wait(work)
        over.set()
        pinning.result()
        for made in work:
            torch.testing.assert_close(made.result(), expected, atol=1e-2, rtol=1e-2)
