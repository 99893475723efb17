"""Sampling (paper, "Sampling"; docs/method.md): raster order, caches, guidance, one seed per image.

:mod:`pra.sampling.algorithm` is the algorithm on a page. The same class samples JiT, from the same seeds and with the
same solvers, but all patches at once.
"""

from pra.sampling.algorithm import Steps, Token, exact_rollout, generate
from pra.sampling.runner import Engine
from pra.sampling.sampler import Sampler, Samplers, check_completes

__all__ = ["Engine", "Sampler", "Samplers", "Steps", "Token", "check_completes", "exact_rollout", "generate"]
