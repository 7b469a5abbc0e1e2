"""Combinations of settings that cannot work: each function yields keys, and what they accept."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guided_diffusion.config.schema import (
    Config,
    DiffusionConfig,
    LatentConfig,
    NetworkConfig,
    ScheduleConfig,
    TrainingParams,
)

Problems = Iterator[tuple[str, str]]  # a key of the vocabulary, and what it accepts


def latent_problems(latent: LatentConfig) -> Problems:
    unet, channels = latent.unet, latent.autoencoder.embed_dim
    if unet.in_channels != 2 * channels + 1:
        what = "two latents of latent.autoencoder.embed_dim channels each, and the hole"
        yield "latent.unet.in_channels", f"{2 * channels + 1}, for {what}"
    if unet.out_channels != channels:
        yield "latent.unet.out_channels", f"{channels}, as latent.autoencoder.embed_dim"
    rates = [2**level for level in range(len(unet.channel_mult))]
    if not {*unet.attention_resolutions} <= {*rates}:
        yield "latent.unet.attention_resolutions", f"among {rates}, the rates of the levels"


def precision_problems(network: NetworkConfig) -> Problems:
    if network.use_fp16:
        yield "use_fp16", "false in training, where use_bf16 is the switch to half precision"


def crop_problems(training: TrainingParams) -> Problems:
    if training.scales and training.crop != "random":
        yield "scales", "null without crop: random, since it has no effect then"


def diffusion_problems(diffusion: DiffusionConfig, schedule: ScheduleConfig | None) -> Problems:
    steps = diffusion.diffusion_steps
    if diffusion.noise_schedule == "linear" and steps <= 20:
        yield "diffusion_steps", "numbers > 20 (linear betas reach 1 at 20), or a cosine schedule"
    kept = diffusion.kept_steps
    if schedule and schedule.t_T > min(kept, steps) > 0:
        limit = "the steps that diffusion_steps and timestep_respacing leave"
        yield "schedule_jump_params.t_T", f"at most {min(kept, steps)}, {limit}"
    if not 1 <= kept <= steps:
        yield "timestep_respacing", f"from 1 to {steps} steps in all, the diffusion_steps"


def class_problems(config: Config) -> Problems:
    last = config.network.num_classes - 1
    if not 0 <= (config.cond_y or 0) <= last:
        yield "cond_y", f"null or a whole number from 0 to {last}"


def ddim_problems(config: Config) -> Problems:
    if config.ddim_eta and not config.use_ddim:
        yield "ddim_eta", "0 without use_ddim: true, since it has no effect then"


def sampler_problems(values: Mapping[str, Any], sampler: str) -> Problems:
    if sampler == "langevin":
        if any(key.startswith("schedule_jump_params.") for key in values):
            yield "schedule_jump_params", "no such section with sampler: langevin; set evaluations"
        if values.get("use_ddim"):
            yield "use_ddim", "false with sampler: langevin, whose steps are its own"
        return
    for key in values:
        if key == "evaluations" or key.startswith("langevin."):
            yield key, "no such key without sampler: langevin"


def langevin_problems(config: Config) -> Problems:
    params, steps = config.langevin, config.diffusion.diffusion_steps
    if not params:
        return
    if params.levels and params.levels > steps:
        yield "langevin.levels", f"at most {steps}, the diffusion_steps"
    if params.sigma_min >= params.sigma_max:
        yield "langevin.sigma_min", f"a number below langevin.sigma_max, {params.sigma_max:g}"
    if params.inner_from >= params.inner_to:
        yield "langevin.inner_from", f"a number below langevin.inner_to, {params.inner_to:g}"


def start_problems(config: Config) -> Problems:
    steps = config.schedule.t_T if config.schedule else config.diffusion.kept_steps
    if config.start_from and config.start_from.t >= steps:
        yield "start_from.t", f"from 0 to {steps - 1}, the times of the schedule"


def dataset_problems(values: Mapping[str, Any], image_size: int | None) -> Problems:
    if values.get("data.eval.*.image_size", image_size) != image_size:
        same = f"{image_size or 'null'}, as image_size at the top, or no such key"
        yield "data.eval.*.image_size", same
    fit = values.get("data.eval.*.fit")
    if fit == "tile" and values.get("method") == "latent":
        why = "whose noisy latents cannot be blended pixel by pixel"
        yield "data.eval.*.fit", f"crop or region with method: latent, {why}"
    if fit == "region" and image_size is None:
        yield "data.eval.*.fit", "crop, or set image_size, the side of the squares around holes"
    if fit == "tile" and values.get("data.eval.*.batch_size", "auto") not in ("auto", 1):
        yield "data.eval.*.batch_size", "1 or auto with fit: tile, where windows are a batch"
    gt_path, mask_path = (values.get(f"data.eval.*.{key}") for key in ("gt_path", "mask_path"))
    if gt_path and mask_path and _is_same_file(gt_path, mask_path):
        yield "data.eval.*.mask_path", "masks in a folder of their own, apart from gt_path"
    if values.get("data.eval.*.batch_size") == "auto" and values.get("data.eval.*.drop_last"):
        yield "data.eval.*.drop_last", "false with batch_size auto, or a number as batch_size"
    if fit in ("region", "tile") and values.get("data.eval.*.random_flip"):
        yield "data.eval.*.random_flip", f"false with fit: {fit}, which gives whole photos back"
    outputs = [key for key in values if ".paths." in key]
    inputs = ["data.eval.*.gt_path", "data.eval.*.mask_path", "start_from.path"]
    yield from folder_problems(values, outputs, inputs)


def folder_problems(
    values: Mapping[str, Any], outputs: Sequence[str], inputs: Sequence[str]
) -> Problems:
    """Outputs that would overwrite inputs or one another, or be found among the inputs later."""
    owners: dict[str, str] = {}
    for key in filter(values.get, outputs):
        folder = os.path.realpath(values[key])
        if folder in owners:
            yield key, f"a folder of its own; this is that of {owners[folder]}"
        owners[folder] = key.rpartition(".")[2]
        for source in filter(values.get, inputs):
            if _is_among(folder, os.path.realpath(values[source])):
                name = source.removeprefix("data.eval.*.")
                yield key, f"a folder apart from {name}, which is input"


def _is_same_file(path: str, other: str) -> bool:
    """A folder is not one: it may hold images and their masks."""
    is_folder = "://" in path or os.path.isdir(path)
    return not is_folder and os.path.realpath(path) == os.path.realpath(other)


def _is_among(folder: str, source: str) -> bool:
    if os.path.isfile(source):
        return folder == os.path.dirname(source)
    return os.path.commonpath([folder, source]) == source
