"""Features in full float32 whatever the user's settings, which are restored afterwards."""

import contextlib
import os
import traceback

import torch
from support import processes

from pra.evaluation.features import Features, Published, exact

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

KINDS = (
    torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
)  # fmt: skip


def told(switch):
    try:
        return switch()
    except RuntimeError:  # the older and the newer switches disagree
        return "mixed"


def state():
    backends = torch.backends
    kinds = backends, backends.cudnn, backends.cudnn.rnn, *KINDS
    switches = [lambda kind=kind: kind.fp32_precision for kind in kinds]
    switches += [lambda: backends.cuda.matmul.allow_tf32, lambda: backends.cudnn.allow_tf32]
    switches += [torch.get_float32_matmul_precision]
    cudnn = backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic
    return [told(switch) for switch in switches], cudnn, torch.is_autocast_enabled("cpu")


def check(setting):
    backends = torch.backends
    exec(setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = state()
        for error in (MemoryError, None):
            with contextlib.suppress(MemoryError), exact(torch.device("cpu")):
                assert [kind.fp32_precision for kind in KINDS] == ["ieee"] * 4
                assert backends.cuda.matmul.allow_tf32 is False
                assert torch.get_float32_matmul_precision() == "highest"
                assert not backends.cudnn.benchmark
                assert backends.cudnn.deterministic
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
                torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2))
                if error:
                    raise error
            assert state() == before, (setting, before, state())
    backends.fp32_precision = "ieee"  # what followed this one follows it still
    assert "backends.fp32_precision" not in setting or backends.cuda.matmul.fp32_precision == "ieee"


def check_all(rank):
    """Each in its own process: torch cannot undo some mixtures of its older and newer switches."""
    for setting in SETTINGS:
        child = os.fork()
        if child == 0:
            try:
                check(setting)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, setting


def test_exact_leaves_the_switches_as_they_were():
    assert processes.api(1, check_all) == [0]


def test_published_network_is_read_in_exact_arithmetic():
    seen = []

    def read(images):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return Features(images.float().mean(dim=(2, 3)), None, None)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        Published("mean", 3, "0" * 64, torch.device("cpu"), read)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert seen == [("ieee", False)]
    assert torch.backends.cuda.matmul.fp32_precision != "ieee"
