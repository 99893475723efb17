"""The comparison systems: the same size as the PRA run they change."""

import pytest
import torch

from pra import recipe
from pra.config import JiTConfig, Solver
from pra.models import build_model, count_parameters
from pra.recipes import RECIPES
from pra.recipes.systems import SYSTEMS, TOLERANCE, parameters


@pytest.mark.parametrize("base", RECIPES)
def test_systems_are_as_large_as_their_recipe(base):
    """Pixel systems spend the codec on depth first: one block more would be too many, and the rest widens the head. JiT
    is as wide as the backbone where some depth fits."""
    pra, pixel, jit = (recipe(name).model for name in (base, f"{base}:teacher-forced", f"{base}:jit"))
    assert TOLERANCE <= 0.03
    for system in SYSTEMS:
        assert abs(parameters(recipe(f"{base}:{system}").model) / parameters(pra) - 1) <= TOLERANCE, system
    assert pixel.backbone.depth > pra.backbone.depth
    assert pixel.backbone.width == pra.backbone.width
    assert pixel.head.width >= pra.head.width
    assert parameters(pixel) <= parameters(pra)
    assert recipe(f"{base}:x-prediction").model.backbone == pixel.backbone
    assert isinstance(jit, JiTConfig)
    assert (jit.class_tokens, jit.transformer.heads) == (pra.class_tokens, pra.backbone.heads)
    assert pra.backbone.width / 2 <= jit.transformer.width <= pra.backbone.width
    if base.startswith("pra-"):  # in the others a block is too large a part to meet the number at any width
        assert jit.transformer.width == pra.backbone.width


@pytest.mark.parametrize("name", ["tiny", "tiny:jit"])
def test_parameters_are_those_of_the_model(name):
    model = build_model(recipe(name).model)
    parts = count_parameters(model.config)
    assert sum(parts.values()) == parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert {part: sum(p.numel() for p in getattr(model, part).parameters()) for part, _ in model.named_children()} == {
        part: count for part, count in parts.items() if part != "position"
    }


def test_jit_of_a_large_preset_is_sampled_as_published():
    run = recipe("pra-b-256:jit")
    assert (run.sampling.solver, run.sampling.steps, run.sampling.guidance) == (Solver.HEUN, 50, 2.75)
    assert (run.train.objective.time_mean, run.train.objective.time_std) == (-0.8, 0.8)
    assert run.targets is None


def test_build_model_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        assert all(p.is_meta for p in build_model(recipe("pra-l-256:jit").model).parameters())
