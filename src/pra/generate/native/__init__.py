"""The step's arithmetic compiled for the processor at hand, where there is a C++ compiler; never required."""

from pra.generate.native.build import SWITCH, library
from pra.generate.native.parts import content_hash, take_native

__all__ = ["SWITCH", "content_hash", "library", "take_native"]
