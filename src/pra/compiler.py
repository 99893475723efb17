"""torch's compiler, its pages of complaint in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from pra.errors import PraError

P = ParamSpec("P")
R = TypeVar("R")


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
            return fast(*args, **kwargs)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PraError(f"{what} failed ({reason.strip()[:200]}); install a C++ compiler, or {without}") from error

    return call
