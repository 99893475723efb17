"""The steps' arithmetic compiled for the processor at hand, where there is a C++ compiler; never required.

It is used only for models that it knows exactly (:func:`unsupported`); every other model is run by its own modules.
"""

from pra.sampling.native.build import SWITCH, library
from pra.sampling.native.steps import NativeSteps, unsupported

__all__ = ["SWITCH", "NativeSteps", "library", "unsupported"]
