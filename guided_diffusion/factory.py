"""The only place that knows both the config's vocabulary and the classes it stands for."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from guided_diffusion.checkpoints.loading import LATENT_AUTOENCODER, LATENT_UNET, check_weights
from guided_diffusion.config import (
    AutoencoderConfig,
    ClassifierConfig,
    Config,
    LatentConfig,
    NetworkConfig,
    StartConfig,
    TrainingConfig,
    UserError,
    load_config,
)
from guided_diffusion.denoiser import Denoiser, Network, ddim, guided, guided_x0, network_denoiser
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, beta_schedule
from guided_diffusion.inpainter import Inpainter, PixelInpainter, Start
from guided_diffusion.latent import LatentInpainter, latent_process
from guided_diffusion.machine.ranks import ALONE, World
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.networks.params import (
    NUM_CLASSES,
    AutoencoderParams,
    ClassifierParams,
    UNetParams,
)
from guided_diffusion.networks.unet import Classifier, UNet
from guided_diffusion.respace import Process, respaced_process
from guided_diffusion.scheduler import ddim_times, jump_times, plain_times, times_from
from guided_diffusion.speed import choice
from guided_diffusion.speed.choice import Speed
from guided_diffusion.speed.loading import load_autoencoder, load_network


def load_inpainter(
    conf_path: str, device: str | None = None, overrides: Sequence[str] = ()
) -> Inpainter:
    """The inpainter that a config describes; its dataset, if it names one, does not matter.

    device: "cpu", "cuda", "cuda:1", …; None: as the config says. overrides: KEY=VALUE each, as
    for `test.py --set`. Raises UserError.
    """
    config = load_config(conf_path, overrides, require_data=False)
    config = replace(config, device=device or config.device)
    torch_device = pick_device(config.device)
    speed = choose_speed(config, torch_device)
    return build_inpainter(config, build_times(config), torch_device, speed)


def build_inpainter(
    config: Config, times: Sequence[int], device: torch.device, speed: Speed
) -> Inpainter:
    """The inpainter of a config, its weights loaded. Raises UserError.

    times: what the sampler walks, see `build_times`. device: see `pick_device`. speed: see
    `choose_speed`.
    """
    check_checkpoints(config)  # all of them, before any weight is loaded
    if config.latent:
        return _build_latent_inpainter(config, times, device, speed)
    process = build_process(config, device)
    return PixelInpainter(
        _build_denoiser(config, process, device, speed),
        process.diffusion,
        times,
        config.network.image_size,
        num_classes=NUM_CLASSES,
        cond_y=config.cond_y,
        inject_known=config.merge_known,
        time_shift=config.time_shift,
        paste_known=config.paste_known,
        start_from=_kind_of_start(config.start_from),
    )


def _build_latent_inpainter(
    config: Config, times: Sequence[int], device: torch.device, speed: Speed
) -> LatentInpainter:
    return LatentInpainter(
        build_network(config, device, speed),
        build_autoencoder(config, device, speed),
        build_process(config, device),
        times,
        multiple=config.latent.multiple,
        eta=config.ddim_eta,
        image_size=config.image_size,
    )


def _kind_of_start(start: StartConfig | None) -> Start:
    if start is None:
        return "noise"
    return "picture" if start.path else "image"


def check_checkpoints(config: Config) -> None:
    """Compare every key and shape of the checkpoints with the config. Raises UserError."""
    with torch.device("meta"):
        check_weights(
            UNet(network_params(config)), config.model_path, config.latent and LATENT_UNET
        )
        if config.latent:
            autoencoder = Autoencoder(autoencoder_params(config.latent.autoencoder))
            check_weights(autoencoder, config.model_path, LATENT_AUTOENCODER)
        if c := config.classifier:
            params = classifier_params(c, config.network.image_size)
            check_weights(Classifier(params), c.path)


def pick_device(name: str | None, world: World = ALONE) -> torch.device:
    """The device of this name; None: CUDA if there is one. Raises UserError if it is absent.

    world: of several processes on a machine, each gets a GPU of its own.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: found {name}; accepted: cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        return _pick_gpu(device, world)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for, but torch finds none; use device: cpu")
    return device


def _pick_gpu(device: torch.device, world: World) -> torch.device:
    found = torch.cuda.device_count()
    if (device.index or 0) >= found:
        raise UserError(
            f"device: {device} was asked for, but torch finds {found} CUDA "
            "device(s); use device: cpu, or install a torch build for your GPU"
        )
    if world.size == 1:
        return device
    if device.index is not None:
        raise UserError(
            f"device: {device} is one GPU, but there are {world.size} processes; use device: cuda, "
            "which gives each its own"
        )
    if world.local_size > found:
        raise UserError(
            f"device: {world.local_size} processes on this machine, but torch finds {found} CUDA "
            f"device(s); start with --nproc_per_node={found}, or use device: cpu"
        )
    return torch.device("cuda", world.local_rank)


def choose_speed(config: Config, device: torch.device) -> Speed:
    """How the denoiser will be computed. Raises UserError for what the device does not offer."""
    if config.classifier:
        _choose_classifier_speed(config, device)
    if not config.latent:
        return choice.choose_speed(config.speed, config.network.use_fp16, device)
    wishes = config.speed
    if config.image_size is None and wishes.compile is None:
        wishes = replace(wishes, compile=False)  # each size would be compiled anew
    return choice.choose_speed(wishes, False, device)


def _choose_classifier_speed(config: Config, device: torch.device) -> Speed:
    use_fp16 = config.classifier.use_fp16
    return choice.choose_speed(config.speed, use_fp16, device, "classifier_use_fp16")


def build_network(config: Config, device: torch.device, speed: Speed) -> Network:
    """The denoising network alone, weights loaded: (x_t, t[, y]) -> output. Raises UserError."""
    with torch.device("meta"):
        network = UNet(network_params(config))
    if config.latent:
        return load_network(network, config.model_path, speed, device, part=LATENT_UNET)
    return load_network(network, config.model_path, speed, device)


def build_autoencoder(config: Config, device: torch.device, speed: Speed) -> Autoencoder:
    """The autoencoder of a latent config, weights loaded. Raises UserError."""
    with torch.device("meta"):
        autoencoder = Autoencoder(autoencoder_params(config.latent.autoencoder))
    side = config.latent.nominal_size
    return load_autoencoder(autoencoder, config.model_path, speed, device, side)


def build_process(config: Config | TrainingConfig, device: torch.device | str = "cpu") -> Process:
    """The respaced diffusion of a config. Raises UserError."""
    if isinstance(config, Config) and config.latent:
        steps, _ = ddim_times(config.latent.ddim_steps)
        return latent_process(steps, device)
    d = config.diffusion
    try:
        return respaced_process(
            beta_schedule(d.noise_schedule, d.diffusion_steps),
            d.timestep_respacing,
            rescale_timesteps=d.rescale_timesteps,
            device=device,
        )
    except ValueError as error:
        raise UserError(
            f"{config.source}: timestep_respacing: found {d.timestep_respacing}: {error}; "
            "accepted: a number of steps that there is room for, such as 50"
        ) from error


def build_times(config: Config) -> list[int]:
    """The times that the sampler walks. Raises UserError if it cannot take these steps."""
    diffusion = build_process(config).diffusion
    _check_ddim_eta(config, diffusion)
    if config.latent:
        return ddim_times(config.latent.ddim_steps)[1]
    alphas_cumprod = diffusion.alphas_cumprod
    steps = len(alphas_cumprod)
    times = jump_times(config.schedule) if config.schedule else plain_times(steps)
    if config.start_from:
        times = times_from(times, config.start_from.t)
    _check_time_shift(config, times, steps)
    if times[0] < steps - 1 and not config.start_from:
        noise = (1 - alphas_cumprod[times[0]]) ** 0.5
        warnings.warn(
            f"sampling starts from pure noise at step {times[0]} of {steps}, whose noise level is "
            f"{noise:.3f}, not 1: results suffer. If you lowered t_T to save time, set also "
            f"timestep_respacing: '{config.schedule.t_T}', or leave that key out",
            UserWarning,
            stacklevel=2,
        )
    return times


def _check_ddim_eta(config: Config, diffusion: GaussianDiffusion) -> None:
    largest = diffusion.largest_ddim_eta
    if config.ddim_eta > largest:
        raise UserError(
            f"{config.source}: ddim_eta: found {config.ddim_eta:g}, which adds more noise than "
            f"some step leaves room for; accepted: from 0 to {math.floor(largest * 1000) / 1000:g}"
        )


def _check_time_shift(config: Config, times: list[int], steps: int) -> None:
    shift = config.time_shift
    used = [t + shift for t, u in pairwise(times) if u > t]
    if used and not (min(used) >= 0 and max(used) < steps):
        raise UserError(
            f"{config.source}: inpa_inj_time_shift: found {shift}, with which re-noising needs "
            f"steps {min(used)} to {max(used)} of a diffusion of {steps} steps; accepted: 1"
        )


def _build_denoiser(
    config: Config, process: Process, device: torch.device, speed: Speed
) -> Denoiser:
    denoiser = network_denoiser(
        build_network(config, device, speed),
        process,
        class_cond=config.network.class_cond,
        predict_xstart=config.diffusion.predict_xstart,
        clip_denoised=config.clip_denoised,
    )
    if config.classifier:
        guide = guided_x0 if config.use_ddim else guided
        classifier = _build_classifier(config, device)
        denoiser = guide(denoiser, classifier, process, config.classifier.scale)
    return ddim(denoiser, process, config.ddim_eta) if config.use_ddim else denoiser


def _build_classifier(config: Config, device: torch.device) -> Network:
    c = config.classifier
    speed = _choose_classifier_speed(config, device)
    with torch.device("meta"):
        classifier = Classifier(classifier_params(c, config.network.image_size))
    return load_network(classifier, c.path, speed, device, gradients=True)


def network_params(config: Config) -> UNetParams:
    """The shape of the denoiser of a config, pixel or latent."""
    return config.latent.unet_params if config.latent else config.network.params


def unet_params(network: NetworkConfig) -> UNetParams:
    """The shape of a denoiser of pixels."""
    return network.params


def latent_unet_params(latent: LatentConfig) -> UNetParams:
    """The shape of a denoiser of latents."""
    return latent.unet_params


def autoencoder_params(autoencoder: AutoencoderConfig) -> AutoencoderParams:
    """The shape of the autoencoder that a config describes."""
    return autoencoder.params


def classifier_params(classifier: ClassifierConfig, image_size: int) -> ClassifierParams:
    """The shape of the classifier that a config describes."""
    return classifier.params(image_size)
