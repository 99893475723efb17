"""A PRA model from a few numbers, for every recipe."""

from __future__ import annotations

from pra.config import CodecConfig, EncoderConfig, HeadConfig, ModelConfig, TransformerConfig


def sized(
    side: int | tuple[int, int],
    channels: int,
    patch_size: int,
    num_classes: int,
    *,
    backbone: tuple[int, int, int],
    head: tuple[int, int],
    state_dim: int,
    encoder: tuple[int, int],
    decoder: tuple[int, int, int],
    class_tokens: int = 4,
    modulations: int = 1,
    sees_condition: bool = False,
) -> ModelConfig:
    """Return a PRA model: ``backbone`` and ``decoder`` are depth, width and heads, ``head`` and ``encoder`` depth and
    width; ``sees_condition`` is the encoder's."""
    return ModelConfig(
        image_size=(side, side) if isinstance(side, int) else side,
        channels=channels,
        patch_size=patch_size,
        num_classes=num_classes,
        class_tokens=class_tokens,
        backbone=TransformerConfig(depth=backbone[0], width=backbone[1], heads=backbone[2]),
        head=HeadConfig(depth=head[0], width=head[1], modulations=modulations),
        codec=CodecConfig(
            state_dim=state_dim,
            encoder=EncoderConfig(depth=encoder[0], width=encoder[1], sees_condition=sees_condition),
            decoder=TransformerConfig(depth=decoder[0], width=decoder[1], heads=decoder[2]),
        ),
    )
