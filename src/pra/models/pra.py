"""PRA: backbone, head, codec and the auxiliary predictor, composed; and their initialisation, all of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pra.config import ModelConfig, SamplingConfig
from pra.models.backbone import Backbone
from pra.models.head import FlowHead
from pra.models.states import build_codec
from pra.nn.patches import patchify, unpatchify
from pra.nn.transformer import KVCache, Transformer


class PRA(nn.Module):
    """The model of design section 2. Baselines are other configurations of it.

    Args:
        config: sizes and choices.
        seed: of the initial weights. They do not depend on, nor disturb, torch's global random state.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # Travels with the weights, as what their author recommends; nothing in the model reads them.
        self.sampling = SamplingConfig()
        self.classes = tuple(str(label) for label in range(config.num_classes))
        with torch.random.fork_rng(devices=[]):  # torch's modules draw initial weights of their own
            self.backbone = Backbone(config)
            self.head = FlowHead(config)
            self.codec = build_codec(config)
            # L_aux: h_i predicts the per-patch-normalised x_i. Used in training only.
            self.auxiliary = nn.Linear(config.backbone.width, config.patch_dim)
        initialise(self, seed)

    def patchify(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, N, P)``."""
        return patchify(images, self.config.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """``(B, rows * columns, P)`` to ``(B, C, rows * p, W)``; any number of whole rows of patches."""
        columns = self.config.grid[1]
        return unpatchify(patches, self.config.patch_size, (patches.shape[1] // columns, columns))

    def write(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """The one path from states to pixels, in training and in sampling: decoded, clamped to [-1, 1], float32."""
        return self.codec.decode(states, cache).float().clamp(-1.0, 1.0)

    def clean_conditions(self, labels: Tensor, patches: Tensor) -> Tensor | None:
        """``F(c, x)`` for the encoder, ``(B, n, D)`` for ``n`` patches; None where the encoder does not see it."""
        if not self.codec.sees_condition:
            return None
        return self.backbone(labels, patches[:, :-1])  # type: ignore[no-any-return]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in [-1, 1] with labels ``(B,)``, through the codec and back."""
        patches = self.patchify(images)
        states = self.codec.encode(patches, self.clean_conditions(labels, patches))
        return self.unpatchify(self.write(states))


@torch.no_grad()
def initialise(model: PRA, seed: int) -> None:
    """Sets every parameter, from ``seed`` alone.

    Matrices are Xavier-normal, embeddings normal with standard deviation 0.02, biases zero, norms one.
    Projections back into a transformer's residual stream are divided by ``sqrt(2 depth)`` (GPT-2). What
    modulates the head, and its output, starts at zero (DiT, arXiv 2212.09748): the head begins as the zero field.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _normal(module.weight, (2.0 / sum(module.weight.shape)) ** 0.5, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _normal(module.weight, 0.02, generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    _normal(model.backbone.next_position, 0.02, generator)
    for module in model.modules():
        if isinstance(module, Transformer):
            for name, parameter in module.named_parameters():
                if name.endswith(".out.weight"):
                    parameter.div_((2 * module.config.depth) ** 0.5)
    for linear in [*model.head.modulations, model.head.final_modulation, model.head.out]:
        nn.init.zeros_(linear.weight)


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Drawn on the CPU, so that a seed means the same weights on every device."""
    if not parameter.is_meta:
        parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
