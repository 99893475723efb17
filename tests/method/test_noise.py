"""Keyed noise: a function of the key alone, and properly distributed."""

import pytest
import torch

from pra.method import noise

KEYS = noise.keys(11, torch.arange(2000))


def test_numbers_have_the_stated_distributions():
    z = noise.normal(KEYS, 500).double()
    moments = [z.pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)
    # Tails: P(|z| > 3) = 0.0027.
    assert (z.abs() > 3).double().mean().item() == pytest.approx(0.0027, abs=0.0003)
    u = noise.uniform(KEYS, 500)
    assert 0 <= u.min() < u.max() < 1
    histogram = torch.histc(u, bins=20, min=0, max=1) / u.numel()
    assert torch.allclose(histogram, torch.full((20,), 0.05), atol=0.001)


def test_keys_positions_and_streams_are_uncorrelated():
    z = noise.normal(KEYS[:60], 4000)
    assert (torch.corrcoef(z) - torch.eye(60)).abs().max() < 0.08
    assert (torch.corrcoef(z.T[:60, :]) - torch.eye(60)).abs().max() < 0.7  # 60 samples only
    other = noise.normal(noise.fold(KEYS[:60], 1), 4000)
    assert (z * other).mean(dim=1).abs().max() < 0.08


def test_number_depends_on_its_key_only():
    whole = noise.normal(KEYS, 7, 11)
    chosen = torch.tensor([1999, 3, 500])
    assert torch.equal(noise.normal(KEYS[chosen], 7, 11), whole[chosen])
    assert torch.equal(noise.normal(KEYS[5], 7, 11), whole[5])
    # More numbers continue the same sequence.
    assert torch.equal(noise.normal(KEYS[:4], 100)[:, :77], whole[:4].flatten(1))


def test_seeds_indices_and_purposes_differ():
    drawn = [
        noise.normal(noise.fold(noise.keys(seed, torch.tensor([index])), purpose), 4)
        for seed in (0, 1, -1, 2**62)
        for index in (0, 1, 2**40)
        for purpose in noise.Purpose
    ]
    assert len({tuple(z.flatten().tolist()) for z in drawn}) == len(drawn)


def test_seed_meanings_do_not_drift():
    """Golden numbers: changing them changes what every published seed means."""
    key = noise.keys(42, torch.tensor([7]))
    assert noise.normal(key, 3).flatten().tolist() == pytest.approx([0.5237789, 0.0649353, -0.6941158], abs=1e-6)
    assert noise.permutation(key[0], 8).tolist() == [7, 2, 4, 3, 1, 5, 0, 6]


def test_fold_of_a_number_equals_fold_of_a_tensor():
    for value in (0, 1, 8, 2**63 - 1, 2**63, 2**64 - 1, -5):
        signed = (value + 2**63) % 2**64 - 2**63
        assert torch.equal(noise.fold(KEYS, value), noise.fold(KEYS, torch.tensor(signed)))


def test_permutation_is_complete_and_differs_by_key():
    one, other = (noise.permutation(key, 1000) for key in KEYS[:2])
    assert one.sort().values.equal(torch.arange(1000))
    assert not one.equal(other)


@pytest.mark.gpu
def test_numbers_on_cuda_are_the_same():
    assert torch.equal(noise.normal(KEYS.cuda(), 100).cpu(), noise.normal(KEYS, 100))
