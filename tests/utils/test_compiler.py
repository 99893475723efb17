"""torch's compiler where it fails: one line, and before the backward pass."""

import functools

import torch
from support.refusal import refused

from pra.utils.compiler import compiled


def test_compiled_without_a_compiler_is_one_line(monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    fast = compiled(lambda x: (x * x).sum(), "train.compile", "do without")
    refused(lambda: fast(torch.ones(3)), "train.compile failed", "install a C++ compiler, or do without")


def test_compiled_compiles_the_backward_pass_at_once(monkeypatch):
    """Failures must come while it is still possible to run uncompiled."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config as functorch
    from torch._functorch.aot_autograd import make_boxed_func

    def fail(*_):
        raise RuntimeError("no backward pass")

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=fail)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    fast = compiled(lambda x: (x * x).sum(), "this", "do without")
    x = torch.ones(3, requires_grad=True)
    refused(lambda: fast(x), "this failed", "no backward pass", "do without")
    assert not functorch.force_non_lazy_backward_lowering
