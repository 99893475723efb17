"""Numbers and classes on the command line."""

from dataclasses import replace

import pytest
import torch
from support.models import LEARNED, random_jit, random_model
from support.refusal import refused

from pra.commands.options import How, parse_labels, parse_numbers
from pra.config import SamplingConfig, Solver, TimeGrid, from_dict, to_dict
from pra.errors import PraError
from pra.models.weights import SHIPPED
from pra.sampling import Sampler
from pra.sampling.requests import changed_sampling


def test_numbers_and_ranges_are_parsed():
    for text, numbers in (("0", [0]), ("0,3", [0, 3]), (" 1 , 5-6,0", [1, 5, 6, 0]), ("7-7", [7])):
        assert parse_numbers(text, "--seeds") == numbers
    for text in ("", "a", "-1", "1-", "3-1", "1,,2", "1.5", "1-2-3", str(2**63), "٣x", "0-99999999"):
        refused(lambda text=text: parse_numbers(text, "--seeds"), option="--seeds", value=repr(text))


def test_labels_are_numbers_or_names():
    classes = ("cat", "dog", "fire engine", "x-ray")
    assert parse_labels("all", classes) == [0, 1, 2, 3]
    assert parse_labels("dog,0, fire engine ,2-3,x-ray", classes) == [1, 0, 2, 2, 3, 3]
    for text, label in (("4", 4), ("1-9", 4)):
        refused(lambda text=text: parse_labels(text, classes), "0 to 3", label=label)
    refused(lambda: parse_labels("dgo", classes), "did you mean 'dog'?", code="unknown", name="dgo")
    assert parse_labels("tench, Tinca tinca", ("crane", "tench, Tinca tinca")) == [1]


def test_labels_name_of_two_classes_is_refused():
    classes = ("crane", "dog", "crane")
    refused(lambda: parse_labels("dog,crane", classes), "2 classes", "0, 2", code="conflict", value="crane")
    assert parse_labels("0,2", classes) == [0, 2]


def test_name_comes_before_number_with_a_warning():
    classes = ("0", "1", "10", "2")  # as folders sort them
    assert parse_labels("0,1,3-3,10", classes) == [0, 1, 3, 2]  # none has the number 10
    with pytest.warns(UserWarning, match="3 is not the name of a class, and class number 3 is called 2. Write 3-3"):
        assert parse_labels("3", classes) == [3]
    with pytest.warns(UserWarning, match="label 2 .* number 3. Write 2-2 for class number 2"):
        assert parse_labels("2", classes) == [3]
    assert parse_labels("2-2", classes) == [2]


def test_steps_along_the_raster_that_do_not_fit_are_refused():
    model, shortcut = random_model(), random_model(head=replace(LEARNED.head, shortcut=True))

    wrong = "raster_steps"
    refused(lambda: SamplingConfig(steps=3, raster_steps=(2, 1)), "Set steps to 2", name=wrong, value="2,1")
    refused(lambda: SamplingConfig(steps=3, raster_steps=()), name=wrong)
    refused(lambda: SamplingConfig(steps=1, times=(0, 1), raster_steps=(1,)), "times", name=wrong)
    refused(lambda: Sampler(model, raster_steps=[2, 0]), "positive")
    refused(lambda: Sampler(model, raster_steps="2,1"), "expected a list")
    refused(lambda: Sampler(model, raster_steps=[1] * 13), "13 numbers for 12 raster positions", name=wrong)
    refused(lambda: Sampler(random_jit(), raster_steps=[2, 1]), "all patches at once", code="unsupported", name=wrong)
    refused(lambda: Sampler(shortcut, solver="shortcut", raster_steps=[4, 3]), "not steps 3")
    refused(lambda: How(raster_steps="2,1.5").sampler(SHIPPED, torch.device("cpu")), "whole numbers")


def test_steps_along_the_raster_set_the_steps():
    config = changed_sampling(SamplingConfig(), {"raster_steps": [4, 2, 1]})
    assert (config.steps, config.raster_steps, config.steps_in_words) == (4, (4, 2, 1), "4, 2, 1 (along the raster)")
    assert [config.steps_at(position, 5) for position in range(5)] == [4, 4, 2, 2, 1]
    assert changed_sampling(config, {"guidance": 2.0}).raster_steps == (4, 2, 1)
    assert changed_sampling(config, {"steps": 2}) == replace(SamplingConfig(), steps=2)
    assert changed_sampling(config, {"times": [0, 0.3, 1]}).raster_steps is None
    assert config.with_steps(4) == config
    assert config.with_steps(2).raster_steps is None
    assert from_dict(SamplingConfig, to_dict(config)) == config


def test_shortcut_error_names_only_what_is_wrong():
    model = random_model(head=replace(LEARNED.head, shortcut=True))
    for changes, wrong in (
        ({"steps": 3}, "steps 3"),
        ({"steps": 4, "shift": 2.0}, "shift 2"),
        ({"steps": 3, "time_grid": TimeGrid.COSINE}, "steps 3, time_grid cosine"),
        ({"steps": 2, "times": (0.0, 0.5, 1.0)}, "times"),
    ):
        with pytest.raises(PraError, match=f"not {wrong}$"):
            Sampler(model, SamplingConfig(solver=Solver.SHORTCUT, **changes))
