"""Names of data sources, the digits, and packages that are imported only where they are needed."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from support.data import picture
from support.refusal import refused

import pra
from pra.data import open_source
from pra.data.images import ArraySource
from pra.data.source import check_told_apart, in_classes, learned, same_place
from pra.utils.extras import install_command


def test_open_source_bad_name_is_refused():
    for spec, code, hint in (
        ("digit", "unknown", "did you mean 'digits'?"),
        ("digits@val", "unknown", "digits@test"),
        ("foldr:/x", "unknown", "did you mean 'folder'?"),
        ("folder:", "missing", "folder:PATH"),
        ("idx:@test", "missing", "idx:PATH"),
        ("imagenet-tar", "missing", "imagenet-tar:PATH"),
        ("~", "unknown", "folder:"),
        (5000 * "a", "unknown", "Known:"),
    ):
        refused(lambda spec=spec: open_source(spec), hint, code=code, name=spec)


def test_open_source_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "a.png")
    assert open_source("folder:~").name == "folder:~"


def test_digits_splits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is in the extra 'train'")
    train, test, everything = open_source("digits"), open_source("digits@test"), datasets.load_digits()
    assert (len(train), len(test)) == (1498, 299)
    assert train.classes == test.classes == tuple("0123456789")
    assert test.labels.tolist() == everything.target[5::6].tolist()
    assert train.labels[:6].tolist() == everything.target[[0, 1, 2, 3, 4, 6]].tolist()
    assert train.labels.dtype == np.int64
    expected = np.rint(everything.images[11] * 255 / 16).astype(np.uint8)
    assert (np.asarray(test.image(1)) == expected).all()
    assert max(np.asarray(train.image(i)).max() for i in range(9)) == 255
    assert test.where(17) == "image 17 of digits@test"


def test_sources_missing_package_is_named(monkeypatch):
    for spec, module, extra in (
        ("digits", "sklearn.datasets", "train"),
        ("hf:cifar10", "datasets", "hf"),
        ("wds:/x/{0..1}", "braceexpand", "wds"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        refused(lambda spec=spec: open_source(spec), repr(spec), install_command(extra), code="not-installed")


def test_optional_packages_are_not_imported_at_the_top():
    optional = {"datasets", "pyarrow", "braceexpand", "huggingface_hub", "sklearn", "fontTools"}
    for path in (Path(pra.__file__).parent / "data").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not optional & {name.partition(".")[0] for name in names}, path


def labelled(labels, classes):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    return ArraySource("memory", images, np.array(labels), tuple(classes))


def test_learned_classes_are_those_with_images():
    letters = labelled([3, 1, 1], "0123")
    source = learned(letters, 2)
    assert (source.classes, source.labels.tolist()) == (("1", "3"), [1, 0, 0])
    assert np.asarray(source.image(2)).tolist() == np.asarray(letters.image(2)).tolist()
    assert source.where(1) == "image 1 of memory"
    assert learned(letters, 4) is letters  # a run of an earlier version
    for labels, classes in (([1, 0], "ab"), ([0, 9], "abc"), ([0, 1], "a")):  # nothing to leave out, or to be known
        whole = labelled(labels, classes)
        assert learned(whole, 2) is whole


def test_in_classes_goes_by_names():
    source = in_classes(labelled([2, 0], "axb"), "bca")
    assert (source.classes, source.labels.tolist()) == (("b", "c", "a"), [0, 2])
    assert in_classes(labelled([2, 1], "axb"), "bca") is None
    twice = labelled([1, 2], "abb")
    assert in_classes(twice, "abb") is twice
    assert in_classes(twice, "ab") is in_classes(labelled([0, 1], "ab"), "abb") is None
    refused(
        lambda: check_told_apart(twice),
        "classes 1 and 2",
        "classes.json of a copy",
        code="conflict",
        name="memory",
        value="b",
    )


def test_same_place_is_a_path_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other, same in (
        ("folder:photos", f"folder:{tmp_path}/x/../photos/", True),
        ("idx:d/@test", "idx:./d@test", True),
        ("idx:d", "idx:d@test", False),
        ("folder:photos", "wds:photos", False),
        ("folder:photos", "folder:photos2", False),
        ("digits", "digits", True),
    ):
        assert same_place(one, other) is same
