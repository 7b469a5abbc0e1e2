"""Combinations of settings that cannot work: each function yields keys, and what they accept."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guided_diffusion.config.schema import (
    CHANNEL_MULT_BY_IMAGE_SIZE,
    AutoencoderConfig,
    ClassifierConfig,
    Config,
    DiffusionConfig,
    LatentUNetConfig,
    NetworkConfig,
    ScheduleConfig,
    TrainingParams,
)

Problems = Iterator[tuple[str, str]]  # a key of the vocabulary, and what it accepts


def network_problems(network: NetworkConfig) -> Problems:
    yield from _side_problems("image_size", network.image_size, len(network.channel_mult))
    widths = [int(mult * network.num_channels) for mult in network.channel_mult]
    yield from _multiple_problems("num_channels", 32, "the widths of the levels", widths)
    attended = _attended(network.image_size, widths, network.attention_resolutions)
    if network.num_head_channels != -1:
        heads = {"num_head_channels": [*attended, widths[-1]]}
    else:
        heads = {"num_heads": [*attended, widths[-1]], "num_heads_upsample": attended}
    for key, divided in heads.items():
        yield from _head_problems(key, getattr(network, key), divided)


def _side_problems(key: str, side: int, levels: int) -> Problems:
    if side % 2 ** (levels - 1):
        yield key, f"multiples of 2**{levels - 1}, for {levels} levels of channel_mult"


def latent_unet_problems(unet: LatentUNetConfig, autoencoder: AutoencoderConfig) -> Problems:
    channels = autoencoder.embed_dim
    if unet.in_channels != 2 * channels + 1:
        what = "two latents of latent.autoencoder.embed_dim channels each, and the hole"
        yield "latent.unet.in_channels", f"{2 * channels + 1}, for {what}"
    if unet.out_channels != channels:
        yield "latent.unet.out_channels", f"{channels}, as latent.autoencoder.embed_dim"
    yield from _side_problems("latent.unet.image_size", unet.image_size, len(unet.channel_mult))
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    what = "the widths of the levels"
    yield from _multiple_problems("latent.unet.model_channels", 32, what, widths)
    rates = [2**level for level in range(len(widths))]
    if not {*unet.attention_resolutions} <= {*rates}:
        yield "latent.unet.attention_resolutions", f"among {rates}, the rates of the levels"
    attended = [
        width
        for width, rate in zip(widths, rates, strict=True)
        if rate in unet.attention_resolutions
    ]
    yield from _head_problems("latent.unet.num_heads", unet.num_heads, [*attended, widths[-1]])


def autoencoder_problems(autoencoder: AutoencoderConfig) -> Problems:
    if autoencoder.ch % 32:
        yield "latent.autoencoder.ch", "multiples of 32"


def _head_problems(key: str, divisor: int, widths: list[int]) -> Problems:
    if divisor != -1 and any(width % divisor for width in widths):
        yield key, f"divisors of {widths}, the widths of the levels with attention"


def precision_problems(network: NetworkConfig) -> Problems:
    if network.use_fp16:
        yield "use_fp16", "false in training, where use_bf16 is the switch to half precision"


def crop_problems(training: TrainingParams) -> Problems:
    if training.scales and training.crop != "random":
        yield "scales", "null without crop: random, since it has no effect then"


def classifier_problems(classifier: ClassifierConfig | None, image_size: int) -> Problems:
    if not classifier:
        return
    if image_size not in CHANNEL_MULT_BY_IMAGE_SIZE:
        yield "image_size", "64, 128, 256 or 512, which the classifier can see"
        return
    widths = [int(mult * classifier.width) for mult in CHANNEL_MULT_BY_IMAGE_SIZE[image_size]]
    yield from _multiple_problems("classifier_width", 32, "the widths of the levels", widths)
    attended = _attended(image_size, widths, classifier.attention_resolutions)
    what = "the widths of the levels with attention"
    yield from _multiple_problems("classifier_width", 64, what, [*attended, widths[-1]])


def _multiple_problems(key: str, divisor: int, what: str, widths: list[int]) -> Problems:
    if any(width == 0 or width % divisor for width in widths):
        yield key, f"what makes {widths}, {what}, multiples of {divisor}"


def _attended(image_size: int, widths: list[int], sides: tuple[int, ...]) -> list[int]:
    """The widths of the levels with attention; level i works at 1 / 2**i of the image's side."""
    rates = {image_size // side for side in sides}
    return [width for level, width in enumerate(widths) if 2**level in rates]


def diffusion_problems(diffusion: DiffusionConfig, schedule: ScheduleConfig | None) -> Problems:
    steps = diffusion.diffusion_steps
    if diffusion.noise_schedule == "linear" and steps <= 20:
        yield "diffusion_steps", "numbers > 20 (linear betas reach 1 at 20), or a cosine schedule"
    kept = _kept_steps(diffusion)
    if schedule and schedule.t_T > min(kept, steps) > 0:
        limit = "the steps that diffusion_steps and timestep_respacing leave"
        yield "schedule_jump_params.t_T", f"at most {min(kept, steps)}, {limit}"
    if not 1 <= kept <= steps:
        yield "timestep_respacing", f"from 1 to {steps} steps in all, the diffusion_steps"


def ddim_problems(config: Config) -> Problems:
    if config.ddim_eta and not config.use_ddim:
        yield "ddim_eta", "0 without use_ddim: true, since it has no effect then"


def _kept_steps(diffusion: DiffusionConfig) -> int:
    counts = [int(count) for count in re.findall("[0-9]+", diffusion.timestep_respacing)]
    return sum(counts) if counts else diffusion.diffusion_steps


def start_problems(config: Config) -> Problems:
    steps = config.schedule.t_T if config.schedule else _kept_steps(config.diffusion)
    if config.start_from and config.start_from.t >= steps:
        yield "start_from.t", f"from 0 to {steps - 1}, the times of the schedule"


def dataset_problems(values: Mapping[str, Any], image_size: int | None) -> Problems:
    if values.get("data.eval.*.image_size", image_size) != image_size:
        same = f"{image_size or 'null'}, as image_size at the top, or no such key"
        yield "data.eval.*.image_size", same
    if values.get("data.eval.*.fit") == "region" and image_size is None:
        yield "data.eval.*.fit", "crop, or set image_size, the side of the squares around holes"
    gt_path, mask_path = (values.get(f"data.eval.*.{key}") for key in ("gt_path", "mask_path"))
    if gt_path and mask_path and os.path.realpath(gt_path) == os.path.realpath(mask_path):
        yield "data.eval.*.mask_path", "masks in a folder of their own, apart from gt_path"
    if values.get("data.eval.*.batch_size") == "auto" and values.get("data.eval.*.drop_last"):
        yield "data.eval.*.drop_last", "false with batch_size auto, or a number as batch_size"
    if values.get("data.eval.*.fit") == "region" and values.get("data.eval.*.random_flip"):
        yield "data.eval.*.random_flip", "false with fit: region, which gives whole photos back"
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


def _is_among(folder: str, source: str) -> bool:
    if os.path.isfile(source):
        return folder == os.path.dirname(source)
    return os.path.commonpath([folder, source]) == source
