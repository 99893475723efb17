"""Devices by name, and the precision that each has."""

import os
from contextlib import nullcontext

import pytest
import torch

from pra.config import Precision
from pra.utils import device


@pytest.mark.parametrize("has", [True, False])
def test_auto_precision_is_bfloat16_where_the_gpu_has_it(has, monkeypatch):
    asked = []

    def supported(including_emulation):
        asked.append(including_emulation)
        return has

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    gpu = torch.device("cuda", 10 + has)  # what a device has is asked once
    assert device.in_bfloat16(gpu, Precision.AUTO) is has
    assert device.in_bfloat16(gpu, Precision.BFLOAT16)
    assert not device.in_bfloat16(gpu, Precision.FLOAT32)
    assert not device.in_bfloat16(torch.device("cpu"), Precision.AUTO)
    assert asked == [False]


def test_gpu_named_by_number_becomes_current(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda", "cpu", "cuda:1"):
        assert device.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda", 1)]


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 9}, raising=False)
    assert device.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert device.cores() == 128
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert device.cores() == 1
