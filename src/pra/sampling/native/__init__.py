"""Arithmetic of the steps, compiled for this processor if there is a C++ compiler. It is never required.

It runs only models that it knows exactly (:func:`unsupported`). Every other model runs by its own modules.
"""

from pra.sampling.native.build import SWITCH, library
from pra.sampling.native.steps import NativeSteps, unsupported

__all__ = ["SWITCH", "NativeSteps", "library", "unsupported"]
