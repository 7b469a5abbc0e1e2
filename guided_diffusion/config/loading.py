"""From a YAML file to dataclasses, and back."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from guided_diffusion.config import schema
from guided_diffusion.config.file import ConfigFile
from guided_diffusion.config.problems import (
    class_problems,
    crop_problems,
    dataset_problems,
    ddim_problems,
    diffusion_problems,
    folder_problems,
    langevin_problems,
    latent_problems,
    precision_problems,
    sampler_problems,
    start_problems,
)
from guided_diffusion.config.vocabulary import METHODS, TRAINING, key_of, kinds_of
from guided_diffusion.networks.params import CHANNEL_MULT_BY_IMAGE_SIZE


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), require_data: bool = True
) -> schema.Config:
    """Read the YAML file of an inpainting run.

    path: a local file.
    overrides: KEY=VALUE each, with a dotted path and a YAML value; they win over the file.
    require_data: False allows a file without a dataset (`Config.dataset` is None then).

    Raises UserError, one line, for everything that can be wrong with it.
    """
    file = ConfigFile(os.fspath(path), overrides, METHODS)
    if require_data and not file.dataset_name:
        file.refuse("data.eval", "exactly one dataset, as data.eval.NAME")
    config = _latent_config(file) if file.method == "latent" else _pixel_config(file)
    file.refuse_first(dataset_problems(file.values, config.image_size))
    return config


def _pixel_config(file: ConfigFile) -> schema.Config:
    sampler = file.values.get("sampler", "repaint")
    if sampler == "langevin":
        file.drop_unless_overridden("schedule_jump_params", by="sampler")
        file.values["timestep_respacing"] = ""  # it takes its levels from all steps
    file.refuse_first(sampler_problems(file.values, sampler))
    schedule = file.make(schema.ScheduleConfig) if file.has("schedule_jump_params.") else None
    if schedule:
        file.values.setdefault("timestep_respacing", str(schedule.t_T))
    classifier = file.make(schema.ClassifierConfig)
    config = _config(
        file,
        network=_network(file),
        diffusion=file.make(schema.DiffusionConfig),
        langevin=file.make(schema.LangevinConfig) if sampler == "langevin" else None,
        schedule=schedule,
        start_from=file.make(schema.StartConfig) if file.has_section("start_from") else None,
        classifier=classifier if classifier.scale and classifier.path else None,
        unguided=classifier.missing,
    )
    file.refuse_first(
        diffusion_problems(config.diffusion, schedule),
        class_problems(config),
        ddim_problems(config),
        start_problems(config),
        langevin_problems(config),
    )
    if config.classifier:
        network = config.network
        shape = partial(
            classifier.params, network.image_size, network.in_channels, network.num_classes
        )
        file.refuse_misshapen(schema.ClassifierConfig, shape)
    return config


def _latent_config(file: ConfigFile) -> schema.Config:
    unet, autoencoder = file.make(schema.LatentUNetConfig), file.make(schema.AutoencoderConfig)
    latent = file.make(schema.LatentConfig, unet=unet, autoencoder=autoencoder)
    config = _config(
        file, latent=latent, network=None, diffusion=None, schedule=None, classifier=None
    )
    file.refuse_first(latent_problems(latent))
    file.refuse_misshapen(schema.LatentUNetConfig, partial(unet.params, unet.image_size))
    file.refuse_misshapen(schema.AutoencoderConfig, lambda: autoencoder.params)
    return config


def _config(file: ConfigFile, **parts: Any) -> schema.Config:
    """The run, from the keys that all methods have, and the parts that one of them has."""
    dataset = file.make(schema.DatasetConfig, name=file.dataset_name) if file.dataset_name else None
    speed = file.make(schema.SpeedConfig)
    return file.make(schema.Config, source=file.source, speed=speed, dataset=dataset, **parts)


def load_training_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> schema.TrainingConfig:
    """Read the YAML file of a training run; arguments and errors as in `load_config`."""
    file = ConfigFile(os.fspath(path), overrides, {"pixel": TRAINING})
    config = file.make(
        schema.TrainingConfig,
        source=file.source,
        network=_network(file),
        diffusion=file.make(schema.DiffusionConfig),
        training=file.make(schema.TrainingParams),
    )
    file.refuse_first(
        diffusion_problems(config.diffusion, None),
        precision_problems(config.network),
        crop_problems(config.training),
        folder_problems(file.values, outputs=["log_dir"], inputs=["data_dir"]),
    )
    return config


def _network(file: ConfigFile) -> schema.NetworkConfig:
    """The network, with `channel_mult` by image size where the file leaves it open."""
    network = file.make(schema.NetworkConfig)
    if not network.channel_mult:
        if network.image_size not in CHANNEL_MULT_BY_IMAGE_SIZE:
            accepted = "64, 128, 256, 512, or any if channel_mult is set, as in '1,2,2,4'"
            file.refuse("image_size", accepted)
        network = replace(network, channel_mult=CHANNEL_MULT_BY_IMAGE_SIZE[network.image_size])
    file.refuse_misshapen(schema.NetworkConfig, lambda: network.params)
    return network


def to_yaml_dict(config: schema.Config | schema.TrainingConfig) -> dict[str, Any]:
    """The effective config as YAML files write it; written out and loaded, it is equal again."""
    tree: dict[str, Any] = {}
    for key, value, _ in _settings(config):
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(config.dataset.name if section == "*" else section, {})
        node[last] = _as_yaml(value)
    return tree


def pixel_settings(config: schema.Config) -> dict[str, Any]:
    """The settings that a result's pixels depend on, but for those at their defaults.

    By dotted key; those of the dataset by the last word alone.
    """
    return {
        key.removeprefix("data.eval.*."): _as_yaml(value)
        for key, value, field in _settings(config)
        if field.metadata["pixels"] and value != field.default
    }


def _settings(
    config: schema.Config | schema.TrainingConfig,
) -> Iterator[tuple[str, Any, Field]]:
    """The key, the value and the field of each setting."""
    vocabulary = METHODS[config.method] if isinstance(config, schema.Config) else TRAINING
    for part in _parts(config):
        for field in fields(part):
            key = key_of(type(part), field.name)
            if field.name in kinds_of(type(part)) and key in vocabulary.known:
                yield key, getattr(part, field.name), field


def _parts(config: Any) -> Iterator[Any]:
    """A dataclass and those in its fields, however deep."""
    yield config
    for value in filter(is_dataclass, vars(config).values()):
        yield from _parts(value)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(str(number).removesuffix(".0") for number in value)
    return value
