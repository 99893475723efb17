"""The systems that the paper compares with, as changes to a PRA run: the same model, the same loop.

| system            | state     | AR inputs                           | head predicts |
|-------------------|-----------|-------------------------------------|---------------|
| teacher-forced    | the patch | clean                               | v             |
| x-prediction      | the patch | clean                               | x             |
| input-noise       | the patch | clean + Gaussian noise              | v             |
| input-noise-x     | the patch | clean + Gaussian noise              | x             |
| states            | learned   | clean                               | v             |
| reconstructed     | learned   | decoded from unperturbed states     | v             |
| exact             | learned   | sampled sequentially by the model   | v             |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pra.config import Clean, Exact, Noised, Prediction, Reconstructed, Rollout, RunConfig

# Pixels in [-1, 1]; the best of a coarse look, to be swept by whoever compares in earnest.
INPUT_NOISE = 0.3


def _pixel(config: RunConfig, prediction: Prediction, rollout: Rollout) -> RunConfig:
    """The patch itself as the state."""
    head = replace(config.model.head, prediction=prediction)
    return _inputs(replace(config, model=replace(config.model, codec=None, head=head)), rollout)


def _inputs(config: RunConfig, rollout: Rollout) -> RunConfig:
    return replace(config, train=replace(config.train, rollout=rollout), targets=None)


SYSTEMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "teacher-forced": lambda run: _pixel(run, Prediction.VELOCITY, Clean()),
    "x-prediction": lambda run: _pixel(run, Prediction.DATA, Clean()),
    "input-noise": lambda run: _pixel(run, Prediction.VELOCITY, Noised(sigma=INPUT_NOISE)),
    "input-noise-x": lambda run: _pixel(run, Prediction.DATA, Noised(sigma=INPUT_NOISE)),
    "states": lambda run: _inputs(run, Clean()),
    "reconstructed": lambda run: _inputs(run, Reconstructed()),
    "exact": lambda run: _inputs(run, Exact()),
}
