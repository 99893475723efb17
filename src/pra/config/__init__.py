"""Every setting of a run, as frozen dataclasses that check themselves. Standard library only.

Build a configuration with a recipe, change it with :func:`dataclasses.replace` or :func:`override`, write it with
:func:`to_dict`, read it back with :func:`from_dict`. Names follow the paper (arXiv 2606.27978).
"""

from pra.config.model import (
    AnyModelConfig,
    CodecConfig,
    DeblockConfig,
    EncoderConfig,
    FrozenConfig,
    HeadConfig,
    ImageConfig,
    JiTConfig,
    ModelConfig,
    Prediction,
    TextConfig,
    TransformerConfig,
)
from pra.config.run import DataConfig, Fit, OnCorrupt, OnSmall, RunConfig, Targets
from pra.config.sampling import SHORTCUT_STEPS, GuidanceSchedule, SamplingConfig, Solver, TimeGrid, check_sampling
from pra.config.training import (
    Clean,
    EncoderInput,
    Exact,
    LearningRate,
    MatrixOptimizer,
    Muon,
    Noised,
    ObjectiveConfig,
    OptimizerConfig,
    Parallel,
    Parallelism,
    PixelLoss,
    Precision,
    Reconstructed,
    Rollout,
    TrainConfig,
)
from pra.config.values import TAGGED, apply_settings, differences, from_dict, model_from_dict, override, to_dict
