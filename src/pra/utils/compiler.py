"""torch.compile, with its errors in one line."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch

from pra.errors import PraError

P = ParamSpec("P")
R = TypeVar("R")


def can_compile(device: torch.device) -> bool:
    """Return whether what torch.compile needs is there: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return device.type == "cpu" and any(shutil.which(name) for name in names if name)


def compiled(function: Callable[P, R], what: str, without: str) -> Callable[P, R]:
    """Return the function, compiled at its first call for the shapes of its arguments.

    ``what`` is the setting that asked for it, such as "train.compile", and ``without`` how to do without: "set ...".
    Where the compiler fails, the first call raises a PraError.
    """
    # These take a second to import.
    from torch._dynamo import config as front
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config as back

    fast = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            # Compile the backward pass at once: a failure in backward() would come too late to go without.
            # Notice hooks that were added or removed since: torch ignores new hooks by default.
            with back.patch(force_non_lazy_backward_lowering=True), front.patch(skip_nnmodule_hook_guards=False):
                return fast(*args, **kwargs)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # of the compiler behind torch's front
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            message = f"{what} failed ({reason.strip()[:200]}); install a C++ compiler, or {without}"
            raise PraError(message, code="unsupported") from error

    return call
