"""Every setting of a run, as frozen dataclasses that check themselves, named as in the paper. Standard library only."""

from pra.config.model import (
    AnyModelConfig,
    CodecConfig,
    EncoderConfig,
    HeadConfig,
    ImageConfig,
    JiTConfig,
    ModelConfig,
    Prediction,
    TransformerConfig,
)
from pra.config.run import DataConfig, Fit, OnCorrupt, OnSmall, RunConfig, Targets
from pra.config.sampling import SHORTCUT_STEPS, GuidanceSchedule, SamplingConfig, Solver, TimeGrid, check_sampling
from pra.config.training import (
    Clean,
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
