"""Invariants of the model: causality, cache parity, shapes, sizes, initialisation."""

import pytest
import torch
from support.models import ALL, GROUPS, JIT, LEARNED, batch, random_model

from pra.models import PRA, build_model
from pra.models.base import initialise
from pra.models.head import time_features
from pra.models.transformer import raster_positions, rotary_table, rotate
from pra.recipes import recipe


def test_patchify_is_raster_ordered_and_invertible():
    model = random_model(image_size=(4, 6))
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = model.patchify(images)
    assert patches.shape == (2, 6, 12)
    # Patch 4 is the second of the second row: rows 2-3, columns 2-3; laid out row, column, channel.
    assert torch.equal(patches[1, 4].view(2, 2, 3), images[1, :, 2:4, 2:4].permute(1, 2, 0))
    assert torch.equal(model.unpatchify(patches), images)
    assert torch.equal(model.unpatchify(patches[:, :3]), images[:, :, :2])
    assert torch.equal(model.patchify(images[:, :, :2]), patches[:, :3])


def test_patchify_lays_the_patches_of_a_group_side_by_side():
    model = random_model(GROUPS)
    images = torch.arange(2 * 3 * 12 * 16).view(2, 3, 12, 16)
    groups = model.patchify(images)
    assert groups.shape == (2, 12, 48)
    # Group 5 is the second of the second row, its third patch the first of its second row.
    patch = images[1, :, 6:8, 4:6].permute(1, 2, 0)
    assert torch.equal(groups[1, 5].view(4, 2, 2, 3)[2], patch)
    assert torch.equal(model.unpatchify(groups), images)
    assert torch.equal(model.unpatchify(groups[:, :4]), images[:, :, :4])
    single = random_model(GROUPS, group=(1, 1)).patchify(images)
    assert torch.equal(model.unpatchify(single, group=(1, 1)), images)


@pytest.fixture(params=["learned", "groups"])
def scene(request):
    """A model, labels and patches."""
    model = random_model(ALL[request.param])
    images, labels, _ = batch(model.config)
    return model, labels, model.patchify(images)


def test_backbone_and_decoder_are_causal(scene):
    """Patch j leaves h_i for i <= j unchanged, and changes h_{j+1}; state j leaves x^_i for i < j, and changes x^_j."""
    (model, labels, patches), states = scene, torch.randn(2, 12, scene[0].config.group_state_dim)
    conditions, decoded = model.conditions(labels, patches[:, :-1]), model.codec.decode(states)
    nothing = torch.empty(5, 0, patches.shape[2])
    assert torch.pdist(model.conditions(torch.arange(5), nothing)[:, 0]).min() > 1e-3  # of the class
    for changed in range(12):
        other, moved = patches.clone(), states.clone()
        other[:, changed] += 1.0
        moved[:, changed] += 1.0
        after = model.conditions(labels, other[:, :-1])
        assert torch.equal(conditions[:, : changed + 1], after[:, : changed + 1])
        if changed < 11:
            assert not torch.allclose(conditions[:, changed + 1], after[:, changed + 1])
        written = model.codec.decode(moved)
        assert torch.equal(decoded[:, :changed], written[:, :changed])
        assert not torch.allclose(decoded[:, changed], written[:, changed])


def test_patches_of_a_group_are_written_from_all_its_states():
    model, states = random_model(GROUPS), torch.randn(2, 12, 20)
    other = states.clone()
    other[:, 7, 15:] += 1.0  # the last of four
    changed = (model.codec.decode(states) != model.codec.decode(other)).any(dim=0).view(12, 4, 12).any(dim=2)
    assert changed[7].all()
    assert not changed[:7].any()


@pytest.mark.parametrize("name", ["deblocked", "groups"])
def test_deblocking_filter_reads_its_margin_on_all_sides(name):
    model = random_model(ALL[name])  # patches of 2x2, a margin of one pixel
    patches, single = model.patchify(batch(model.config)[0]), random_model(ALL[name], group=(1, 1))
    before = model.picture(patches)
    for pixel, changed in (((0, 0), 1), ((1, 1), 4), ((2, 4), 2 * 2)):
        other = model.unpatchify(patches)
        other[0, 0][pixel] += 0.5
        moved = (single.patchify(model.picture(model.patchify(other)) - before) != 0).any(dim=2)
        assert moved[0].sum() == changed
        assert not moved[1:].any()


def test_deblocking_filter_begins_as_the_identity():
    model = PRA(ALL["deblocked"], seed=0)
    patches = model.patchify(batch(model.config)[0])
    assert torch.equal(model.picture(patches), model.unpatchify(patches))


def test_decoder_without_context_reads_one_state():
    model = random_model(ALL["decoder-without-context"])
    states = torch.randn(2, 12, 5)
    other = states.clone()
    other[:, 4] += 1.0
    changed = (model.codec.decode(states) != model.codec.decode(other)).any(dim=(0, 2))
    assert changed.nonzero().flatten().tolist() == [4]
    cache = model.codec.new_cache(2)
    assert cache is None
    torch.testing.assert_close(decoded(model, states, cache, 1), model.codec.decode(states))


def stepped(model, labels, patches, cache, prefix=0):
    """The backbone's conditions: of a prefix at once, then patch by patch."""
    parts = [model.backbone(model.condition(labels), patches[:, :prefix], cache)]
    for number in range(prefix, 11):
        cache.seek(model.backbone.prefix + number)
        parts.append(model.backbone(None, patches[:, number : number + 1], cache))
    return torch.cat(parts, dim=1)


def decoded(model, states, cache, chunks):
    """The decoder's patches, the states cut into chunks."""
    parts, done = [], 0
    for part in states.split(chunks, dim=1):
        if cache is not None:
            cache.seek(done * model.config.group_size)
        parts.append(model.codec.decode(part, cache))
        done += part.shape[1]
    return torch.cat(parts, dim=1)


def test_backbone_cache_parity_at_every_prefix(scene):
    """A prefix at once, then step by step, equals everything in parallel."""
    model, labels, patches = scene
    parallel = model.conditions(labels, patches[:, :-1])
    for prefix in range(12):
        cache = model.backbone.new_cache(len(labels))
        torch.testing.assert_close(stepped(model, labels, patches, cache, prefix), parallel, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_parity_in_bfloat16(scene):
    """Token by token the arithmetic is that of the parallel pass: the residual stream is float32 in both."""
    model, labels, patches = scene
    exact = model.conditions(labels, patches[:, :-1])
    with torch.autocast("cpu", torch.bfloat16):
        parallel = model.conditions(labels, patches[:, :-1])
        cache = model.backbone.new_cache(len(labels))
        assert cache.keys.dtype is torch.bfloat16
        stepwise = stepped(model, labels, patches, cache)
    assert stepwise.dtype is parallel.dtype is torch.float32
    rounding = (parallel - exact).square().mean().sqrt()
    assert (stepwise - exact).square().mean().sqrt() < 1.2 * rounding


@pytest.mark.parametrize("name", ["learned", "groups"])
def test_decoder_cache_parity(name):
    """Any way to cut the sequence, several tokens behind a filled cache included."""
    model = random_model(ALL[name])
    states = torch.randn(2, 12, model.config.group_state_dim)
    for chunks in ([1] * 12, [5, 7], [1, 4, 1, 6], [12]):
        written = decoded(model, states, model.codec.new_cache(2), chunks)
        torch.testing.assert_close(written, model.codec.decode(states), atol=1e-5, rtol=1e-5)
    cache = model.codec.new_cache(1)
    last = 12 * model.config.group_size
    cache.seek(last)
    with pytest.raises(AssertionError, match=f"has {last} tokens, no more"):
        model.codec.decode(states[:1, :1], cache)


def test_rotary_attention_depends_on_relative_positions():
    table = rotary_table(raster_positions((4, 4)), 8)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rotate(x.expand(1, 1, 16, 8), table)[0, 0] for x in (q, k))
    score = turned_q @ turned_k.T
    # (0,0)-(1,2), (1,1)-(2,3) and (2,1)-(3,3) are the same step down and right.
    same = torch.stack([score[0, 6], score[5, 11], score[9, 15]])
    torch.testing.assert_close(same, same[0].expand(3))
    assert not torch.isclose(score[0, 6], score[0, 9])  # rows and columns are told apart


def test_states_lie_on_the_sphere(scene):
    model, labels, patches = scene
    z = model.codec.encode(patches, model.clean_conditions(labels, patches))
    assert z.shape == (3, 12, model.config.group_state_dim)
    z = z.view(3, 12, -1, 5)
    torch.testing.assert_close(z.norm(dim=-1), torch.full(z.shape[:-1], 5**0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.mean(dim=-1), torch.zeros(z.shape[:-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.codec.normalise(z.flatten(2)), z.flatten(2), atol=1e-4, rtol=1e-4)


def test_encoder_sees_the_condition_where_it_should():
    for name, sees in (("learned", True), ("groups", True), ("encoder-without-h", False)):
        model = random_model(ALL[name])
        patches = model.patchify(batch(model.config)[0])
        clean = [model.clean_conditions(torch.full((3,), label), patches) for label in (0, 1)]
        assert torch.equal(*(model.codec.encode(patches, h) for h in clean)) is not sees


@pytest.mark.parametrize("name", ALL)
def test_model_takes_any_shape_and_clamps_what_it_writes(name):
    for channels, size in ((1, (4, 4)), (2, (2, 10)), (4, (8, 2))):
        size = tuple(side * patches for side, patches in zip(size, ALL[name].group, strict=True))
        model = random_model(ALL[name], channels=channels, image_size=size)
        images, labels, _ = batch(model.config)
        assert model.reconstruct(images, labels).shape == images.shape
        assert model.write(10 * torch.randn(3, 4, model.config.group_state_dim)).abs().max() == 1.0


def test_initial_head_is_the_zero_field():
    model = PRA(LEARNED)
    z, t = torch.randn(2, 3, 5), torch.rand(2, 3)
    assert model.head(z, t, model.head.project(torch.randn(2, 3, 32))).abs().max() == 0


@pytest.mark.parametrize("config", [LEARNED, JIT])
def test_initial_weights_are_a_function_of_the_seed(config):
    states = []
    for torch_seed, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(torch_seed)  # no weight may be left to torch's own initialisation
        before = torch.random.get_rng_state()
        states.append(build_model(config, seed).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert any(not torch.equal(states[0][name], value) for name, value in states[2].items())


def test_time_features_tell_times_apart():
    features = time_features(torch.linspace(0, 1, 101))
    assert features.shape == (101, 256)
    assert torch.cdist(features, features).add(10 * torch.eye(101)).min() > 0.5


@pytest.mark.parametrize(
    ("name", "millions", "parts"),
    [
        ("pra-s-256", 135, {"condition": 12_300_288, "backbone": 85_742_592, "head": 22_081_552, "codec": 14_177_296}),
        ("pra-b-256", 250, {"condition": 12_300_288, "backbone": 170_697_216, "head": 22_081_552, "codec": 43_078_928}),
        ("pra-l-256", 511, {"condition": 16_400_384, "backbone": 403_707_904, "head": 48_590_864, "codec": 43_177_232}),
    ],
)
def test_preset_sizes(name, millions, parts):
    """Totals are within 1 % of the paper's. Counts are exact, so that a changed size is noticed."""
    with torch.device("meta"):
        model = PRA(recipe(name).model)
    total = sum(p.numel() for p in model.parameters())
    assert abs(total / (millions * 1e6) - 1) < 0.01
    assert {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts} == parts


def test_initialise_unknown_kind_of_parameter_is_refused():
    """A parameter without an initial value would hold whatever is in memory."""
    model = PRA(LEARNED, seed=None)
    model.codec.decoder.out = torch.nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match=r"codec.decoder.out.weight has no initial values"):
        initialise(model, 0, [model.backbone.next_position], [])
