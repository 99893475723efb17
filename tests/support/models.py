"""Small models for the tests: random weights, every output alive."""

from dataclasses import replace

import numpy as np
import torch

from pra.config import DeblockConfig, EncoderConfig, JiTConfig, Prediction, TransformerConfig
from pra.method import noise
from pra.models import PRA, JiT
from pra.models.text import ByteRow
from pra.recipes.presets import sized
from support.captions import TEXT

LEARNED = sized(
    (6, 8),
    3,
    2,
    5,
    backbone=(2, 32, 2),
    head=(2, 24),
    state_dim=5,
    encoder=(1, 24),
    decoder=(2, 24, 2),
    class_tokens=3,
    modulations=2,
    sees_condition=True,
)
BLIND = replace(LEARNED, codec=replace(LEARNED.codec, encoder=EncoderConfig(depth=1, width=24, sees_condition=False)))
ALONE = replace(LEARNED, codec=replace(LEARNED.codec, context=False))
DEBLOCKED = replace(LEARNED, codec=replace(LEARNED.codec, deblock=DeblockConfig(margin=1, width=24)))
PIXEL = replace(LEARNED, codec=None)
PIXEL_X = replace(PIXEL, head=replace(LEARNED.head, prediction=Prediction.DATA))

GROUPS = replace(DEBLOCKED, image_size=(12, 16), group=(2, 2))
GROUPS_ALONE = replace(GROUPS, codec=ALONE.codec)
ROWS = replace(PIXEL, image_size=(6, 16), group=(1, 2))
"""Groups of four and of two patches, as many groups as LEARNED has patches."""

CAPTIONED = replace(LEARNED, text=TEXT)
CAPTIONS = ("a cat", "", "\N{PANDA FACE} on a long, long walk")

ALL = {
    "learned": LEARNED,
    "encoder-without-h": BLIND,
    "decoder-without-context": ALONE,
    "deblocked": DEBLOCKED,
    "pixel-v": PIXEL,
    "pixel-x": PIXEL_X,
    "captions": CAPTIONED,
    "groups": GROUPS,
    "groups-without-context": GROUPS_ALONE,
    "pixel-groups": ROWS,
}


JIT = JiTConfig(
    image_size=(6, 8),
    channels=3,
    patch_size=2,
    num_classes=5,
    class_tokens=3,
    transformer=TransformerConfig(depth=2, width=24, heads=2),
)
JITS = {
    "jit": JIT,
    "jit-bottleneck": replace(JIT, bottleneck=4),
    "jit-without-tokens": replace(JIT, class_tokens=0),
    "jit-captions": replace(JIT, text=TEXT),
}


def random_model(config=LEARNED, **changes):
    """Random weights everywhere: an untrained head is the zero field, which would hide many mistakes."""
    return _randomise(PRA(replace(config, **changes), seed=1))


def random_jit(config=JIT):
    """See :func:`random_model`."""
    return _randomise(JiT(config, seed=1))


def _randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def batch(config, size=3):
    """Images in [-1, 1], labels, keys. Labels are rows of a class and a caption where captions are read."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(size, config.channels, *config.image_size, generator=generator) * 2 - 1
    labels = torch.arange(size) % config.num_classes
    if config.text is not None:
        row = ByteRow(config.text.max_length)
        rows = [row(int(label), CAPTIONS[place % len(CAPTIONS)]) for place, label in enumerate(labels)]
        labels = torch.from_numpy(np.stack(rows))
    return images, labels, noise.keys(7, torch.arange(size))
