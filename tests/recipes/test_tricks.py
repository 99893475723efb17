"""The recipe `plus` and its ladder."""

from dataclasses import replace

import pytest
from support.refusal import refused

from pra import recipe
from pra.config import DeblockConfig, Muon
from pra.recipes import RECIPES
from pra.recipes.systems import SYSTEMS
from pra.recipes.tricks import faithful, plus
from studies import ladder
from studies.catalogue import STUDIES
from studies.settings import SCALES, SETTINGS, base


def test_plus_changes_optimizer_losses_and_codec():
    run, changed = recipe("pra-s-256"), recipe("pra-s-256:plus")
    assert changed.train.optimizer == replace(run.train.optimizer, matrices=Muon(lr=5 * run.train.optimizer.lr))
    assert changed.train.objective == replace(run.train.objective, perturbed_weight=0.5)
    assert changed.model.codec == replace(run.model.codec, deblock=DeblockConfig(margin=8, width=384))
    assert replace(changed, model=run.model, train=run.train, recipe=run.recipe) == run


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny" and not name.startswith("pra-")])
def test_recipes_that_a_laptop_finishes_are_plus(name):
    assert plus(recipe(name)) == recipe(name)


@pytest.mark.parametrize("name", ["tiny", "pra-s-256", "tiny:jit", "tiny:teacher-forced"])
def test_faithful_undoes_plus(name):
    assert faithful(plus(recipe(name))) == faithful(recipe(name)) == recipe(name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_of_plus_keep_its_optimizer(system):
    run = recipe(f"tiny:plus:{system}")
    assert run.train.optimizer == plus(recipe("tiny")).train.optimizer
    assert run.train.rollout == recipe(f"tiny:{system}").train.rollout


def test_ladder_ends_with_the_recipe():
    faithful = base(SETTINGS["emoji-64"], SCALES["cpu"])
    rungs = dict(ladder.climb(faithful))
    assert rungs["faithful"] == faithful
    assert rungs["plus"] == plus(faithful)
    assert [*rungs][-1] == "plus"


def test_rungs_in_equal_seconds_take_fewer_steps(monkeypatch, tmp_path):
    cost = tmp_path / "cost.json"
    cost.write_text('{"settings": {"emoji-64": {"plus": {"median": 1.5}}}}')
    monkeypatch.setattr(ladder, "COST", cost)
    cells = {cell.value: cell.config for cell in STUDIES["recipe"].cells(SETTINGS["emoji-64"], SCALES["cpu"])}
    assert cells["plus, equal seconds"].train.steps == 800
    assert "Muon, equal seconds" not in cells
    assert replace(cells["plus, equal seconds"].train, steps=1200) == cells["plus"].train


def test_groups_change_the_model_alone():
    for name, group in (("groups-2", (1, 2)), ("groups-4", (2, 2))):
        run, changed = recipe("tiny:plus"), recipe(f"tiny:plus:{name}")
        assert replace(changed, model=replace(changed.model, group=(1, 1)), recipe=run.recipe) == run
        assert changed.model.group == group
        assert recipe(f"tiny:{name}:teacher-forced").model.group == group


def test_groups_of_a_model_without_raster_are_refused():
    refused(lambda: recipe("tiny:jit:groups-2"), "has no groups", code="unsupported", name="JiT")


@pytest.mark.parametrize("name", ["tiny:pluss", "tiny:", "tiny:plus:jti"])
def test_recipe_unknown_change_is_refused(name):
    refused(lambda: recipe(name), "no system", code="unknown", name=name.rpartition(":")[2])
