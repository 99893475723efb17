"""Linear classifiers over fixed vectors: MAE's SGD, or logistic regression.

Vectors are standardised by the training set's mean and standard deviation: the batch norm without affine of MAE's
linear probe (arXiv 2111.06377, appendix A.1), with the statistics of the whole set in the place of a batch's. What a
classifier leaves open (learning rate or L2) is chosen on a tenth of the training set, then it is fitted again on all of
it; the held-out set is looked at once, and chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.errors import PraError, nearest
from pra.utils.extras import install_command

VALIDATED = 10
"""Every tenth image of the training set is for validation."""

EPOCHS, BATCH, WARMUP, SEED = 30, 256, 0.1, 0
FEWEST_BATCHES = 16
"""Per epoch: small sets have smaller batches."""
SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LOGISTIC_C = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Linear:
    """A kind of linear classifier, ``setting`` the name of what it leaves open and ``values`` the choice.

    ``fit(x, y, queries, classes, values, device)`` fits one to ``x`` ``(n, D)`` and ``y`` ``(n,)`` for each of the
    values and returns what they say of ``queries`` ``(m, D)``: classes ``(len(values), m)``.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    fit: Callable[[Tensor, Tensor, Tensor, int, Sequence[float], torch.device], Tensor]


class Accuracy(NamedTuple):
    """Of a linear classifier, 0 to 1: on the held-out set, on the validation part; and the value chosen by the latter.

    The first of several values that do equally well.
    """

    top1: float
    validation: float
    value: float


def accuracy(
    linear: Linear, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, device: torch.device
) -> Accuracy:
    """Fits and judges a linear classifier.

    Args:
        linear: its kind.
        train: vectors ``(n, D)`` and labels ``(n,)``.
        test: those of the held-out set.
        classes: their number.
        device: where SGD works.

    Raises:
        PraError: scikit-learn is asked for and not there.
    """
    (x, y), (queries, truth) = train, test
    held = torch.arange(len(x)) % VALIDATED == 0
    fitted, validated = _standardised(x[~held], x[held])
    right = linear.fit(fitted, y[~held], validated, classes, linear.values, device) == y[held]
    validation = right.double().mean(dim=1)
    chosen = int(validation.argmax())
    fitted, asked = _standardised(x, queries)
    said = linear.fit(fitted, y, asked, classes, linear.values[chosen : chosen + 1], device)
    return Accuracy((said[0] == truth).double().mean().item(), validation[chosen].item(), linear.values[chosen])


def find_linear(name: str) -> Linear:
    """A kind of classifier by its name.

    Raises:
        PraError: there is none; the nearest name is given.
    """
    if name not in LINEAR:
        raise PraError(f"--classifier {name!r} is unknown{nearest(name, LINEAR)}")
    return LINEAR[name]


def _standardised(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the mean and standard deviation of ``x``; what does not vary becomes zero."""
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    scale = (variance + 1e-6).rsqrt()
    return (x - mean) * scale, (queries - mean) * scale


def _sgd(x: Tensor, y: Tensor, queries: Tensor, classes: int, values: Sequence[float], device: torch.device) -> Tensor:
    """SGD with momentum, no weight decay, a cosine after a warm-up; one classifier per rate, on the same batches.

    The schedule is MAE's, at a batch small enough to do without LARS. Features are fixed, hence no augmentation.
    """
    x, y, queries = x.to(device), y.to(device), queries.to(device)
    weight = torch.zeros(len(values), x.shape[1], classes, device=device, requires_grad=True)
    bias = torch.zeros(len(values), 1, classes, device=device, requires_grad=True)
    # Without weight decay a loss times a rate is learnt at that rate: all classifiers are one parameter.
    rates = torch.tensor(values, device=device)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    size = max(1, min(BATCH, len(x) // FEWEST_BATCHES))
    per_epoch = len(x) // size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / (EPOCHS * per_epoch)))
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)[: per_epoch * size].to(device)
        for rows in torch.split(order, size):
            logits = x[rows] @ weight + bias
            truth = y[rows].unsqueeze(1).expand(-1, len(rates))
            losses = F.cross_entropy(logits.permute(1, 2, 0), truth, reduction="none")
            optimizer.zero_grad()
            (losses.mean(dim=0) @ rates).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (queries @ weight + bias).argmax(dim=2).cpu()


def _rate(done: float) -> float:
    """The share of the full learning rate when ``done`` of 1 is over."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def _logistic(
    x: Tensor, y: Tensor, queries: Tensor, classes: int, values: Sequence[float], device: torch.device
) -> Tensor:
    """scikit-learn's multinomial logistic regression under L2, one for each ``C``; on the CPU."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise PraError(f"--classifier logistic needs scikit-learn; {install_command('train')}, or take sgd") from None
    said = []
    for value in values:
        # A tenth of scikit-learn's precision moves the accuracy by a fraction of its standard error.
        model = LogisticRegression(C=value, max_iter=1_000, tol=1e-3)
        model.fit(x.numpy(), y.numpy())
        said.append(torch.from_numpy(model.predict(queries.numpy())))
    return torch.stack(said)


LINEAR = {
    linear.name: linear
    for linear in (Linear("sgd", "learning rate", SGD_RATES, _sgd), Linear("logistic", "C", LOGISTIC_C, _logistic))
}
