"""What users write in YAML: frozen dataclasses, one loader, every error a user can make."""

from guided_diffusion.config.errors import UserError
from guided_diffusion.config.loading import (
    load_config,
    load_training_config,
    pixel_settings,
    to_yaml_dict,
)
from guided_diffusion.config.schema import (
    CUT,
    LITTLE,
    AutoencoderConfig,
    ClassifierConfig,
    Config,
    DatasetConfig,
    DiffusionConfig,
    LangevinConfig,
    LatentConfig,
    LatentUNetConfig,
    NetworkConfig,
    ScheduleConfig,
    SpeedConfig,
    StartConfig,
    TrainingConfig,
    TrainingParams,
)

__all__ = [
    "CUT",
    "LITTLE",
    "AutoencoderConfig",
    "ClassifierConfig",
    "Config",
    "DatasetConfig",
    "DiffusionConfig",
    "LangevinConfig",
    "LatentConfig",
    "LatentUNetConfig",
    "NetworkConfig",
    "ScheduleConfig",
    "SpeedConfig",
    "StartConfig",
    "TrainingConfig",
    "TrainingParams",
    "UserError",
    "load_config",
    "load_training_config",
    "pixel_settings",
    "to_yaml_dict",
]
