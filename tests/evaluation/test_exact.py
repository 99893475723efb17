"""Features in full float32 whatever a person has allowed, who finds it allowed again afterwards."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor

from pra.evaluation.features import Features, Published

SETTINGS = (
    "pass",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.benchmark = True",
)

SCRIPT = """
import os, sys, traceback
import torch
from pra.evaluation.features import exact

backends = torch.backends
kinds = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv

def told(switch):
    try:
        return switch()
    except RuntimeError:  # the older and the newer switches disagree
        return "mixed"

def state():
    all_kinds = backends, backends.cudnn, backends.cudnn.rnn, *kinds
    switches = [lambda kind=kind: kind.fp32_precision for kind in all_kinds]
    switches += [torch.get_float32_matmul_precision, lambda: backends.cuda.matmul.allow_tf32]
    switches += [lambda: backends.cudnn.allow_tf32]
    cudnn = backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic
    return [told(switch) for switch in switches], cudnn, torch.is_autocast_enabled("cpu")

def check(setting, error):
    exec(setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = state()
        try:
            with exact(torch.device("cpu")):
                assert [kind.fp32_precision for kind in kinds] == ["ieee"] * 4
                assert backends.cuda.matmul.allow_tf32 is False and torch.get_float32_matmul_precision() == "highest"
                assert not backends.cudnn.benchmark and backends.cudnn.deterministic
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
                torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2))
                if error:
                    raise MemoryError
        except MemoryError:
            pass
        assert state() == before, (before, state())
    backends.fp32_precision = "ieee"  # what followed this one follows it still
    assert "backends.fp32_precision" not in setting or backends.cuda.matmul.fp32_precision == "ieee"

for setting in sys.argv[1:]:
    for error in (False, True):
        child = os.fork()  # torch knows no way back from some mixtures of its older and newer switches
        if child == 0:
            try:
                check(setting, error)
            except BaseException:
                print(setting, traceback.format_exc(), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_exact_leaves_the_switches_as_they_were() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *SETTINGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_published_network_is_read_in_exact_arithmetic() -> None:
    seen = []

    def read(images: Tensor) -> Features:
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return Features(images.float().mean(dim=(2, 3)), None, None)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        Published("mean", 3, "0" * 64, torch.device("cpu"), read)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert seen == [("ieee", False)]
    assert torch.backends.cuda.matmul.fp32_precision != "ieee"
