"""The base class of the models, with patches and saved settings; and the initialisation of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pra.config import ImageConfig, SamplingConfig
from pra.models.condition import ClassCondition
from pra.models.transformer import Transformer


class ImageModel(nn.Module):
    """A model of images in patches.

    A subclass also has ``blocks``, the transformer blocks over the patches. Their outputs are the layers of features.
    Its method ``read(labels, patches, t)`` runs the blocks over whole images ``(B, N, P)``, at the flow time ``t``
    ``(1, 1)`` if ``config.reading_time`` is set.

    Attributes:
        condition: makes the tokens before the patches.
        prefix: the number of these tokens.
        sampling: the author's settings, saved with the weights; the model does not read them.
        classes: names of the classes.
        captions: examples of captions, for a model that reads captions.
    """

    config: ImageConfig
    condition: ClassCondition
    prefix: int

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.sampling = SamplingConfig()
        self.classes = tuple(str(label) for label in range(config.num_classes))
        self.captions: tuple[str, ...] = ()

    @property
    def can_complete(self) -> bool:
        """Whether the model can continue an image from its first rows."""
        return self.config.autoregressive

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images ``(B, C, H, W)`` into patches ``(B, N, P)`` in raster order.

        The numbers of a patch are ordered by row, column, channel. Groups of ``k`` patches are ``(B, N / k, k * P)``;
        the patches of a group are in raster order too.
        """
        (b, c, height, width), p, (down, across) = images.shape, self.config.patch_size, self.config.group
        rows, columns = height // (down * p), width // (across * p)
        x = images.reshape(b, c, rows, down, p, columns, across, p)
        return x.permute(0, 2, 5, 3, 6, 4, 7, 1).reshape(b, rows * columns, down * across * p * p * c)

    def unpatchify(self, patches: Tensor, group: tuple[int, int] | None = None) -> Tensor:
        """Join patches ``(B, rows * columns, k * P)`` to images ``(B, C, rows * height, W)``.

        ``rows`` may be any number of whole rows of groups. ``group`` is the model's own by default.
        """
        (down, across), p, c = group or self.config.group, self.config.patch_size, self.config.channels
        columns = self.config.grid[1] // across
        b, rows = len(patches), patches.shape[1] // columns
        x = patches.reshape(b, rows, columns, down, across, p, p, c)
        return x.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(b, c, rows * down * p, columns * across * p)

    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` in [-1, 1] encoded and decoded; unchanged where the model has no codec."""
        return images


class NoDraws(TorchFunctionMode):
    """A context in which torch's modules do not draw initial weights: torch's global random state stays unchanged."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def initialise(model: nn.Module, seed: int, positions: Iterable[Tensor], zeros: Iterable[nn.Linear]) -> None:
    """Set every parameter, from ``seed`` alone.

    Matrices are Xavier-normal, embeddings normal with standard deviation 0.02, biases zero, norms one.
    Projections back into a transformer's residual stream are divided by ``sqrt(2 depth)`` (GPT-2).

    Args:
        model: its parameters are set in place; those on the meta device are left out.
        seed: of the random numbers, drawn on the CPU.
        positions: parameters that are embeddings outside ``nn.Embedding``.
        zeros: linear layers whose weight starts at zero (DiT, arXiv 2212.09748).

    Raises:
        ValueError: this function cannot initialise one of the parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = list(positions)
    known = {id(position) for position in positions}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm):
            known |= {id(parameter) for parameter in module.parameters(recurse=False)}
        if isinstance(module, nn.Linear):
            _normal(module.weight, (2.0 / sum(module.weight.shape)) ** 0.5, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _normal(module.weight, 0.02, generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    for position in positions:
        _normal(position, 0.02, generator)
    for module in model.modules():
        if isinstance(module, Transformer):
            for name, parameter in module.named_parameters():
                if name.endswith(".out.weight"):
                    parameter.div_((2 * module.config.depth) ** 0.5)
    for linear in zeros:
        nn.init.zeros_(linear.weight)
    unset = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if unset:
        raise ValueError(f"{unset[0]} has no initial values. Add its kind of module to initialise()")


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    # Draw on the CPU: a seed gives the same weights on every device.
    if not parameter.is_meta:
        parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
