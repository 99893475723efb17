"""Sampling (paper, "Sampling"; docs/method.md): raster order, caches, guidance, one seed per image.

JiT is sampled by the same class, from the same seeds and with the same solvers, but all patches at once.
"""

from pra.generate.decoding import Decoding
from pra.generate.engine import Engine
from pra.generate.kept import Samplers
from pra.generate.sampler import Sampler, check_completes

__all__ = ["Decoding", "Engine", "Sampler", "Samplers", "check_completes"]
