"""The compiled arithmetic equals torch's, whatever the batch and the threads; and where it cannot be had, torch's."""

import copy
import ctypes
import itertools
import multiprocessing
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import ALL, LEARNED, random_model
from torch import nn

from pra import Sampler
from pra.config import Precision, SamplingConfig, Solver, TransformerConfig
from pra.sampling import Engine, Samplers
from pra.sampling.native import SWITCH, NativeSteps, build, library
from pra.sampling.native.parts import NativeLinear, Packed, content_hash, pairs, panels

GUIDED = SamplingConfig(guidance=3.0, steps=2)
LABELS, SEEDS = [0, 4, 2, 1, 3, 0, 4, 2, 1, 3, 0], list(range(11))

compiles = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="there is no C++ compiler"
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def uncompiled(tmp_path, monkeypatch):
    """Nothing compiled yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))  # sooner
    build.built.cache_clear()
    yield tmp_path
    build.built.cache_clear()


@pytest.fixture
def copied(request, monkeypatch):
    """Do as ``uncompiled`` does; compiling copies the library of this machine."""
    known = library()._name
    folder = request.getfixturevalue("uncompiled")
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: shutil.copy(known, command[-1]))
    return folder


def product(inputs, outputs, bias=True, low=False):
    generator = torch.Generator().manual_seed(inputs)
    linear = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    packed = Packed(low)
    native = NativeLinear(library(), packed.layer(linear))
    native.packed = packed  # holds what it multiplies by
    return linear, native


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_packed_weights_hold_every_output_once():
    matrix = torch.arange(3 * 21.0).view(3, 21)
    packed = panels(matrix)
    assert packed.shape == (2, 3, 16)
    assert torch.equal(packed.permute(1, 0, 2).reshape(3, 32)[:, :21], matrix)
    assert not packed[1, :, 5:].any()
    packed = pairs(matrix)
    assert packed.shape == (2, 16, 16, 2)
    assert torch.equal(packed.permute(1, 3, 0, 2).reshape(32, 32)[:3, :21], matrix)
    assert packed.count_nonzero() == matrix.count_nonzero()


SHAPES = [(1, 1), (5, 16), (96, 97), (160, 480), (33, 250)]


@compiles
@pytest.mark.parametrize("tiles", [True, False])
def test_bfloat16_products_are_of_rounded_matrices(tiles, request, monkeypatch):
    """Round inputs too where the processor multiplies such, by AMX's tiles."""
    if not tiles:
        request.getfixturevalue("uncompiled")
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DPRA_WITHOUT_AMX"))
    for inputs, outputs in SHAPES:
        linear, native = product(inputs, outputs, low=True)
        x = torch.randn(23, inputs, generator=torch.Generator().manual_seed(1))
        for rows in (1, 2, 16, 17, 23):
            y = native(x[:rows])
            given = (x[:rows], x[:rows].bfloat16().float()) if tiles else (x[:rows],)
            expected = [seen @ linear.weight.t().bfloat16().float() + linear.bias for seen in given]
            assert min(float((y - exact).abs().max()) for exact in expected) < 1e-4
            assert torch.equal(native(x[:1]), y[:1])


@compiles
def test_products_are_torchs():
    for (inputs, outputs), bias in itertools.product(SHAPES, (True, False)):
        linear, native = product(inputs, outputs, bias)
        x = torch.randn(23, inputs, generator=torch.Generator().manual_seed(1))
        expected = linear(x)
        for rows in (1, 2, 3, 4, 7, 8, 23):
            close(native(x[:rows]), expected[:rows], 1e-4)
    for low in (False, True):  # what is not finite stays so
        _, native = product(5, 7, low=low)
        x = torch.ones(3, 5)
        x[1, 2], x[2, 0] = torch.nan, torch.inf
        assert native(x).isfinite().all(1).tolist() == [True, False, False]


@compiles
@pytest.mark.parametrize("low", [False, True])
def test_row_depends_on_neither_others_nor_threads(low, threads):
    _, native = product(300, 8000 if low else 1000, low=low)
    x = torch.randn(29, 300, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([native(row) for row in x.split(1)])
    for count in (1, 2, 3, 7):
        threads(count)
        for rows in (1, 6, 29):
            assert torch.equal(native(x[:rows]), alone[:rows])


WIDE = replace(
    LEARNED,
    backbone=TransformerConfig(depth=2, width=128, heads=4),
    head=replace(LEARNED.head, width=136),
    codec=replace(LEARNED.codec, decoder=TransformerConfig(depth=1, width=96, heads=4)),
)
"""Wide enough that threads share its products and its attention."""

EULER = SamplingConfig(solver=Solver.EULER, steps=3, guidance=1.5)
CASES = [(size, GUIDED) for size in (*ALL.values(), WIDE)] + [(LEARNED, EULER), (WIDE, SamplingConfig(steps=1))]


@compiles
@pytest.mark.parametrize(("size", "config"), CASES)
def test_images_depend_on_neither_batch_nor_threads(size, config, threads, monkeypatch):
    model = random_model(size)
    sampler, most = Sampler(model, config), 40 if size is WIDE else 11
    labels, seeds = [i % 5 for i in range(most)], list(range(most))
    threads(1)
    whole = sampler.sample(labels, seeds)
    threads(3)
    for first, last in ((0, most), (0, 1), (3, 8), (10, 11)):
        assert torch.equal(sampler.sample(labels[first:last], seeds[first:last]), whole[first:last])
    if size is WIDE:  # threads shared its step; two patches equal torch's: a last digit grows along the raster
        row = slice(WIDE.patch_size)
        lowered = Sampler(model, config, precision=Precision.BFLOAT16)
        rounded = lowered.sample(labels, seeds)
        assert 0 < (rounded - whole)[:, :, row].abs().mean() < 0.1  # random weights, two patches on
        threads(1)
        assert torch.equal(lowered.sample(labels[:3], seeds[:3]), rounded[:3])
        monkeypatch.setenv(SWITCH, "0")
        begin = row, slice(2 * WIDE.patch_size)
        close(Sampler(model, config).sample(labels, seeds)[:, :, *begin], whole[:, :, *begin], 1e-3)


@compiles
def test_changed_weights_show_however_they_changed():
    model = random_model()
    sampler = Sampler(model, GUIDED)
    before = sampler.sample(LABELS, SEEDS)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stepped = sampler.sample(LABELS, SEEDS)
    assert not torch.equal(stepped, before)
    assert torch.equal(stepped, Sampler(copy.deepcopy(model), GUIDED).sample(LABELS, SEEDS))
    head = model.head.out.weight
    head.data[0, 0], head.data[0, 1] = head.data[0, 1].item(), head.data[0, 0].item()  # their sum stays
    swapped = sampler.sample(LABELS, SEEDS)
    assert not torch.equal(swapped, stepped)
    assert torch.equal(swapped, copy.deepcopy(sampler).sample(LABELS, SEEDS))
    samplers = Samplers(model)
    kept = samplers.of(GUIDED)
    assert samplers.of(GUIDED) is kept
    assert torch.equal(copy.deepcopy(samplers).of(GUIDED).sample(LABELS, SEEDS), swapped)


@compiles
def test_images_without_it_are_the_same(monkeypatch):
    model = random_model()
    steps = Engine(model, GUIDED, 2, Precision.FLOAT32).steps
    for rows in (1, 5):
        states = torch.randn(5, model.config.group_state_dim, generator=torch.Generator().manual_seed(3))[:rows]
        close(steps.normalise(states), model.codec.normalise(states))
        close(steps.normalise(0 * states), 0 * states)
    fast = Sampler(model, GUIDED).sample(LABELS, SEEDS)
    assert isinstance(Engine(model, GUIDED, 2, Precision.FLOAT32).steps, NativeSteps)
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None
    engine = Engine(model, GUIDED, 2, Precision.FLOAT32)
    assert not isinstance(engine.steps, NativeSteps)
    assert "PRA_NATIVE=0" in engine.way.plain
    close(Sampler(model, GUIDED).sample(LABELS, SEEDS), fast, 1e-4)


@compiles
def test_products_of_several_threads_and_after_a_fork(threads):
    threads(2)
    _, native = product(700, 1500)
    x = torch.randn(16, 700)
    expected = native(x)
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(made, expected) for made in pool.map(lambda _: native(x), range(90)))

    def alone(room):
        if room is not None:  # no new thread can start: one does it all
            torch.set_num_threads(8)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
        os._exit(not torch.equal(native(x), expected))

    for room in (None, 2**20):
        child = multiprocessing.get_context("fork").Process(target=alone, args=(room,))
        child.start()
        child.join(60)
        assert child.exitcode == 0


@compiles
def test_library_is_compiled_once_and_again_when_damaged(copied, monkeypatch, recwarn):
    (copied / "cache").write_text("no folder")  # nor is one needed
    assert library() is not None
    (copied / "cache").unlink()
    build.built.cache_clear()
    assert library() is not None
    (file,) = (copied / "cache/pra/native").iterdir()
    build.built.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("it was there"))
        assert library() is not None
    assert file.suffix == ".so"
    file.unlink()  # not emptied: this process has it mapped
    file.write_bytes(b"")
    build.built.cache_clear()
    known = ctypes.CDLL

    def load(path):
        """Load as a new process does, which does not have it already."""
        if Path(path).stat().st_size == 0:
            raise OSError("file too short")
        return known(path)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert library() is not None
    assert file.stat().st_size > 0
    assert not recwarn.list


def test_compiler_that_is_missing_or_fails_is_not_needed(uncompiled, monkeypatch, recwarn):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(uncompiled))
        assert library() is None
        assert Sampler(random_model(), replace(GUIDED, steps=1)).sample([0], [0]).isfinite().all()
    assert not recwarn.list
    build.built.cache_clear()
    compiler = uncompiled / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'no room for registers' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match=r"broken-c\+\+ \(no room for registers\).*PRA_NATIVE=0"):
        assert library() is None
    assert not (uncompiled / "cache").exists()


def test_hash_of_other_tensors_needs_no_compiler(monkeypatch):
    monkeypatch.setattr("pra.sampling.native.parts.library", lambda: pytest.fail("compiled for nothing"))
    for elsewhere in (torch.empty(3, device="meta"), torch.zeros(3).double(), torch.zeros(3, 2).t()):
        assert content_hash([torch.zeros(3), elsewhere]) is None
