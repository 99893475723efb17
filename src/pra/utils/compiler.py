"""torch's compiler, its pages of complaint in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from pra.errors import PraError

P = ParamSpec("P")
R = TypeVar("R")

_AT_ONCE = "force_non_lazy_backward_lowering"
_SKIPS_HOOKS = "skip_nnmodule_hook_guards"


def compiled(function: Callable[P, R], what: str, without: str) -> Callable[P, R]:
    """The same function, compiled at its first call for the shapes that it is called with.

    Args:
        function: what to compile.
        what: what asked for it, for the message: "train.compile".
        without: how to do without it, likewise: "set train.compile=false".

    Raises:
        PraError: at the first call, where the compiler fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    fast = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _backward_at_once(), _hooks_guarded():
                return fast(*args, **kwargs)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # of the compiler behind torch's front
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise PraError(f"{what} failed ({reason.strip()[:200]}); install a C++ compiler, or {without}") from error

    return call


@contextmanager
def _backward_at_once() -> Iterator[None]:
    """What is compiled in the block has its backward pass compiled with it. Left until it is needed, a failure would
    come up in the middle of ``backward()``, when nothing can be done without the compiler any more."""
    from torch._functorch import config

    if not hasattr(config, _AT_ONCE):  # another release
        yield
        return
    before = getattr(config, _AT_ONCE)
    setattr(config, _AT_ONCE, True)
    try:
        yield
    finally:
        setattr(config, _AT_ONCE, before)


@contextmanager
def _hooks_guarded() -> Iterator[None]:
    """A block in which compiled functions notice hooks that were registered or removed since; torch skips that by
    default, and would go on without a new hook."""
    from torch._dynamo import config

    if not hasattr(config, _SKIPS_HOOKS):  # another release
        yield
        return
    with config.patch({_SKIPS_HOOKS: False}):
        yield
