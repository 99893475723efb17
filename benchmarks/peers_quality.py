"""Evaluations that our model and autoregressive-diffusion-pytorch's flow model need, trained and judged alike.

Both learn scikit-learn's digits without classes, which the package does not support. Batches, their order, optimiser
and moving average are the same. A second head of ours is distilled in as many steps again. The benchmark measures FID
on the classifier's features by evaluations per token, and the time at the number that each model needs. A second call
reuses what the folder holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ar_diffusion import flow_model
from torch import Tensor, nn
from tqdm import tqdm

from pra import PRA, PraError, Sampler, load, recipe, to_uint8, train
from pra.config import SHORTCUT_STEPS, DataConfig, ModelConfig, RunConfig, SamplingConfig, Solver
from pra.data import TrainingSet, batches, open_source
from pra.data.images import ArraySource
from pra.evaluation.classifier import Classifier, fit_classifier
from pra.evaluation.evaluate import evaluate
from pra.evaluation.reference import Reference, from_source
from pra.recipes.distill import configure
from pra.sampling.batches import Batch
from pra.sampling.solvers import EVALUATIONS
from pra.training.averages import EMA, exponential
from pra.training.optimizer import build_optimizer
from pra.utils.files import read_json, write_atomically

BATCH = 500
NEAR = 1.05
"""FIDs within 5 % count as equal."""

CPU = torch.device("cpu")
SIZE = (8, 8)
"""Height and width of the digits."""

THEIRS, DISTILLED = "theirs, midpoint", "ours, distilled"

DEFAULT = 30
"""Evaluations that their sampler makes by itself."""

TRIED = {
    THEIRS: (2, 4, 6, 8, 10, 16, DEFAULT, 60),
    "ours, midpoint": (2, 4, 6, 8, 10, 16, 30, 60),
    "ours, adams-bashforth": (1, 2, 3, 4, 5, 6, 8, 10, 16, 30),
    "ours, dpm": (3, 4, 5, 6, 8, 10, 16, 30),
    DISTILLED: SHORTCUT_STEPS,
}
"""Evaluations per token by way to sample: whole intervals of its rule."""


@dataclass(frozen=True)
class Point:
    """A way to sample, its evaluations per token and its FID."""

    way: str
    evaluations: int
    fid: float


Make = Callable[[int], Tensor]
"""Returns a number of images in [-1, 1]."""


def measure(folder: Path, steps: int, images: int) -> tuple[list[Point], Ways]:
    """Train and judge the missing points; ``quality.json`` in the folder grows point by point.

    Args:
        folder: of runs and figures.
        steps: of each training.
        images: judged at each point.

    Raises:
        PraError: the folder holds figures of other settings, the package is not installed, or the disk refuses.
    """
    settings = {"steps": steps, "images": images, "recipe": "digits:faithful"}
    path = folder / "quality.json"
    known = read_json(path) if path.exists() else {"settings": settings, "points": []}
    if known["settings"] != settings:
        raise PraError(f"{path} has other settings ({known['settings']}); repeat those, or choose another folder")
    points = [Point(**row) for row in known["points"]]
    ways = Ways(folder, steps)
    judge = prepare_judge(folder / "judges")
    for way, evaluations in [(way, count) for way, counts in TRIED.items() for count in counts]:
        if any((point.way, point.evaluations) == (way, evaluations) for point in points):
            continue
        points.append(Point(way, evaluations, _fid(ways(way, evaluations), images, judge)))
        print(f"{way:24} {evaluations:3} evaluations: FID {points[-1].fid:.3f}", flush=True)
        text = json.dumps({"settings": settings, "points": [asdict(point) for point in points]}, indent=2) + "\n"
        write_atomically(path, lambda file, text: file.write(text.encode()), text=text)
    return points, ways


def needed(points: Sequence[Point]) -> dict[str, Point]:
    """Return the points that compare ``ours`` and ``theirs``: the best of each, the fewest evaluations within 5 % of
    it, theirs by default, and our fewest evaluations that equal or beat their best."""
    ours = [point for point in points if point.way != THEIRS]
    theirs = [point for point in points if point.way == THEIRS]
    found = {}
    for name, group in (("ours", ours), ("theirs", theirs)):
        found[f"{name}, best"] = best = min(group, key=lambda point: point.fid)
        found[f"{name}, within 5 %"] = _fewest(group, NEAR * best.fid)
    for point in theirs:
        if point.evaluations == DEFAULT:
            found["theirs, as it comes"] = point
    reaching = [point for point in ours if point.fid <= found["theirs, best"].fid]
    if reaching:
        found["ours, no worse than theirs"] = _fewest(reaching, found["theirs, best"].fid)
    return found


def _fewest(points: Sequence[Point], limit: float) -> Point:
    return min((point for point in points if point.fid <= limit), key=lambda point: (point.evaluations, point.fid))


class Ways:
    """The ways to sample; a model is trained, or read, when it is first asked for.

    Args:
        folder: of the runs.
        steps: of each training.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.run = folder, unconditional(steps)
        self.ours: dict[bool, PRA] = {}

    def __call__(self, way: str, evaluations: int) -> Make:
        """The settings that make images."""
        if way == THEIRS:
            peer = train_peer(self.run, self.folder / "peer.pt", evaluations)
            return lambda images: 2 * peer.sample(batch_size=images) - 1  # type: ignore[operator, no-any-return]
        distilled = way == DISTILLED
        solver = Solver.SHORTCUT if distilled else Solver(way.removeprefix("ours, "))
        config = SamplingConfig(solver=solver, steps=evaluations // EVALUATIONS[solver])
        sampler = Sampler(self._model(distilled), config)
        return lambda images: sampler.sample([0] * images, range(images))

    def _model(self, distilled: bool) -> PRA:
        if distilled not in self.ours:
            run, folder = self.run, self.folder / "pra"
            if distilled:
                self._model(False)  # trains the run that the second head learns from
                run, folder = configure(str(folder), self.run.train.steps), self.folder / "pra-distilled"
            train(run, folder, device="cpu", source=one_class())
            model = load(folder)
            assert isinstance(model, PRA)
            self.ours[distilled] = model
        return self.ours[distilled]


Judge = tuple[Classifier, Reference]
"""The classifier whose features judge, and the statistics of the real digits."""


def prepare_judge(folder: Path) -> Judge:
    """Fit the classifier, which ``folder`` keeps, to the digits with their classes."""
    source, data = open_source("digits"), DataConfig(source="digits")
    extractor = fit_classifier(source, SIZE, 1, data, CPU, progress=False, folder=folder)
    return extractor, from_source(source, SIZE, 1, data, extractor, keep=2, progress=False)


def _fid(make: Make, images: int, judge: Judge) -> float:
    extractor, reference = judge
    torch.manual_seed(0)  # theirs draws from torch's own generator

    def samples() -> Iterator[Batch]:
        for start in range(0, images, BATCH):
            yield Batch(to_uint8(make(min(BATCH, images - start))), None, start)

    report = evaluate(samples(), reference, extractor, images, keep=2, progress=False)
    return float(report.figures["torch-fidelity"]["fid"])  # type: ignore[arg-type]


# --- training -------------------------------------------------------------------------------------------------


def unconditional(steps: int) -> RunConfig:
    """The recipe digits, of one class."""
    run = recipe("digits:faithful")
    assert isinstance(run.model, ModelConfig)
    objective = replace(run.train.objective, class_dropout=0.0)
    trained = replace(run.train, steps=steps, sample_every=0, objective=objective)
    return replace(run, model=replace(run.model, num_classes=1), train=trained)


def one_class() -> ArraySource:
    """The digits without their classes."""
    source = open_source("digits")
    pictures = np.stack([np.asarray(source.image(index)) for index in range(len(source))])
    return ArraySource("digits", pictures, np.zeros(len(source), np.int64), ("digit",))


def train_peer(run: RunConfig, path: Path, evaluations: int) -> nn.Module:
    """Return the peer's flow model of the run's sizes, trained like the run, on its batches; or read from ``path``.

    The weights are the averaged weights. ``evaluations`` are those of the peer's head per token.
    """
    assert isinstance(run.model, ModelConfig)
    if not path.exists():
        weights = _train_peer(run, run.model).state_dict()
        write_atomically(path, lambda file: torch.save(weights, file))
    model = flow_model(run.model, evaluations)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _train_peer(run: RunConfig, size: ModelConfig) -> nn.Module:
    config = run.train
    torch.manual_seed(config.seed)
    model: Any = flow_model(size, 2).train()
    optimizer, ema = build_optimizer(model, config.optimizer), EMA(model, exponential(config.optimizer.ema_decay))
    data = TrainingSet(one_class(), size.image_size, size.channels, run.data, config.seed)
    stop = config.steps * config.batch_size
    for step, batch in enumerate(tqdm(batches(data, 0, config.batch_size, stop), total=config.steps, mininterval=5)):
        optimizer.set_rates(config.optimizer, step, config.steps)
        loss = model(batch.images.float() / 255)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        ema.update(model, step)
    return ema.model
