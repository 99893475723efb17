"""Fixtures that several test files share."""

import importlib.util
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pra
from pra.evaluation import classifier

# The models are tiny: threads cost more than they give, above all where the cores are shared. Also in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


LONGEST = (
    "test_readme.py", "test_loop.py", "test_studies.py", "test_parallel.py", "test_callbacks.py",
    "test_demo_browser.py", "test_study_reports.py", "test_bench_train.py", "test_engine.py", "test_flops.py",
)  # fmt: skip
"""The slowest files, which start first, so that one worker does not run long after the others."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of the recipe ``tiny``: 20 steps, checkpoints at 10 and 20. To be read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pra.train(pra.recipe("tiny"), folder, device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """An empty cache for a file's classifiers, with short fits."""
    folder = tmp_path_factory.mktemp("classifiers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "cache_folder", lambda: folder)
        patch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=1))
        yield folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def full_disk():
    """``with full_disk(4096):`` no file can grow beyond 4096 bytes; writing fails as on a full disk.

    Python ignores the signal that comes with it.
    """

    @contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="session")
def torchvision_shim():
    """torchvision and lpips, importable. Skips where they are not installed.

    torchvision's import fails where its compiled operators do not fit torch (a CUDA build beside a CPU torch, say).
    LPIPS does not use these operators: declaring those that the import asks for is enough.
    """
    for package in ("torchvision", "lpips"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'pra-pixels[perceptual]'")
    library = None
    try:
        import torchvision
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    yield
    del library  # alive until here
