"""The only place that knows both the config's vocabulary and the classes it stands for."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from guided_diffusion.checkpoints.loading import (
    LATENT_AUTOENCODER,
    LATENT_UNET,
    Blank,
    Checkpoint,
    check_weights,
)
from guided_diffusion.config import Config, DiffusionConfig, StartConfig, UserError, load_config
from guided_diffusion.denoiser import Denoiser, Network, ddim, guided, guided_x0, network_denoiser
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, beta_schedule
from guided_diffusion.inpainter import Inpainter, NetworkDoubts, PixelInpainter, Start
from guided_diffusion.machine.ranks import ALONE, World
from guided_diffusion.networks.unet import Classifier, UNet
from guided_diffusion.respace import Process, respaced_process
from guided_diffusion.scheduler import ddim_times, levels_of, times_of
from guided_diffusion.speed import choice
from guided_diffusion.speed.choice import Speed
from guided_diffusion.speed.loading import load_autoencoder, load_network

# What only some methods need is imported in their models, so that no other run waits for it.
if TYPE_CHECKING:
    from guided_diffusion.latent import LatentInpainter
    from guided_diffusion.networks.autoencoder import Autoencoder
    from guided_diffusion.quick import LangevinInpainter

Networks = dict[str, "Network | Autoencoder"]  # "denoiser", and perhaps others, ready for use


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
    model, checkpoints = model_of(config), check_checkpoints(config)
    networks = model.load(checkpoints, device, speed)
    inpainter = model.inpainter(networks, model.process(device), times)
    inpainter.network_doubts = model.doubts(checkpoints["denoiser"].network, device)
    return inpainter


# ---- Networks --------------------------------------------------------------------------------


def build_networks(config: Config) -> dict[str, Blank]:
    """The networks of a config on the meta device, the "denoiser" first."""
    with torch.device("meta"):
        return model_of(config).networks()


def check_checkpoints(config: Config) -> dict[str, Checkpoint]:
    """The networks of a config, each with a checkpoint that fits it. Raises UserError."""
    blanks = build_networks(config)
    return dict(zip(blanks, check_weights(*blanks.values()), strict=True))


def load_networks(config: Config, device: torch.device, speed: Speed) -> Networks:
    """The networks of a config, ready to be evaluated fast: x_t, t, … -> output.

    All checkpoints are compared before any weight is loaded. Raises UserError.
    """
    return model_of(config).load(check_checkpoints(config), device, speed)


def choose_speed(config: Config, device: torch.device) -> Speed:
    """How the denoiser will be computed. Raises UserError for what the device does not offer."""
    return model_of(config).choose_speed(device)


def build_process(config: Config, device: torch.device | str = "cpu") -> Process:
    """The respaced diffusion of a config. Raises UserError."""
    return model_of(config).process(device)


class PixelModel:
    """Method pixel: RePaint with a denoiser of pixels, which a classifier may guide."""

    def __init__(self, config: Config):
        self.config = config

    def networks(self) -> dict[str, Blank]:
        config, network, classifier = self.config, self.config.network, self.config.classifier
        blanks = {"denoiser": Blank(UNet(network.params), config.model_path)}
        if classifier:
            params = classifier.params(network.image_size, network.in_channels, network.num_classes)
            blanks["classifier"] = Blank(Classifier(params), classifier.path)
        return blanks

    def choose_speed(self, device: torch.device) -> Speed:
        if self.config.classifier:
            self._classifier_speed(device)
        return choice.choose_speed(self.config.speed, self.config.network.use_fp16, device)

    def _classifier_speed(self, device: torch.device) -> Speed:
        wishes, use_fp16 = self.config.speed, self.config.classifier.use_fp16
        return choice.choose_speed(wishes, use_fp16, device, "classifier_use_fp16")

    def load(
        self, checkpoints: Mapping[str, Checkpoint], device: torch.device, speed: Speed
    ) -> Networks:
        networks = {"denoiser": load_network(checkpoints["denoiser"], speed, device)}
        if classifier := checkpoints.get("classifier"):
            own = self._classifier_speed(device)
            networks["classifier"] = load_network(classifier, own, device, gradients=True)
        return networks

    def process(self, device: torch.device | str) -> Process:
        return pixel_process(self.config.diffusion, self.config.source, device)

    def doubts(self, network: UNet, device: torch.device) -> NetworkDoubts:
        """network: the filled denoiser itself, neither compiled nor captured."""

        def ask(picture: torch.Tensor, keep_mask: torch.Tensor) -> str | None:
            from guided_diffusion.checkpoints.doubts import Doubts  # which short runs do not need

            diffusion = replace(self.config.diffusion, timestep_respacing="")
            all_steps = pixel_process(diffusion, self.config.source, device)
            return Doubts(network, all_steps, self.config.network, diffusion)(picture, keep_mask)

        return ask

    def inpainter(
        self, networks: Networks, process: Process, times: Sequence[int]
    ) -> PixelInpainter:
        config = self.config
        return PixelInpainter(
            self._denoiser(networks, process),
            process.diffusion,
            times,
            config.network.image_size,
            num_classes=config.network.num_classes,
            channels=config.network.in_channels,
            cond_y=config.cond_y,
            merge_known=config.merge_known,
            time_shift=config.time_shift,
            paste_known=config.paste_known,
            start_from=_kind_of_start(config.start_from),
        )

    def _denoiser(self, networks: Networks, process: Process) -> Denoiser:
        config = self.config
        denoiser = network_denoiser(
            networks["denoiser"],
            process,
            class_cond=config.network.class_cond,
            predict_xstart=config.diffusion.predict_xstart,
            clip_denoised=config.clip_denoised,
        )
        if config.classifier:
            guide = guided_x0 if config.use_ddim or config.langevin else guided
            denoiser = guide(denoiser, networks["classifier"], process, config.classifier.scale)
        return ddim(denoiser, process, config.ddim_eta) if config.use_ddim else denoiser


class QuickModel(PixelModel):
    """Method pixel with the quick sampler, whose levels are steps of the base process."""

    def inpainter(
        self, networks: Networks, process: Process, times: Sequence[int]
    ) -> "LangevinInpainter":
        from guided_diffusion.quick import LangevinInpainter

        config = self.config
        return LangevinInpainter(
            self._denoiser(networks, process),
            process.diffusion,
            levels_of(config),
            config.network.image_size,
            config.langevin.attraction,
            num_classes=config.network.num_classes,
            channels=config.network.in_channels,
            cond_y=config.cond_y,
            merge_known=config.merge_known,
            start_from=_kind_of_start(config.start_from),
        )


class LatentModel:
    """Method latent: latent diffusion, with a denoiser of latents and an autoencoder."""

    def __init__(self, config: Config):
        self.config = config
        self.latent = config.latent

    def networks(self) -> dict[str, Blank]:
        from guided_diffusion.networks.autoencoder import Autoencoder

        path, latent = self.config.model_path, self.latent
        return {
            "denoiser": Blank(UNet(latent.unet_params), path, LATENT_UNET),
            "autoencoder": Blank(Autoencoder(latent.autoencoder.params), path, LATENT_AUTOENCODER),
        }

    def choose_speed(self, device: torch.device) -> Speed:
        wishes = self.config.speed
        if self.config.image_size is None and wishes.compile is None:
            wishes = replace(wishes, compile=False)  # each size would be compiled anew
        return choice.choose_speed(wishes, False, device)

    def load(
        self, checkpoints: Mapping[str, Checkpoint], device: torch.device, speed: Speed
    ) -> Networks:
        autoencoder, side = checkpoints["autoencoder"], self.latent.nominal_size
        return {
            "denoiser": load_network(checkpoints["denoiser"], speed, device),
            "autoencoder": load_autoencoder(autoencoder, speed, device, side),
        }

    def process(self, device: torch.device | str) -> Process:
        from guided_diffusion.latent import latent_process

        steps, _ = ddim_times(self.latent.ddim_steps)
        return latent_process(steps, device)

    def doubts(self, network: UNet, device: torch.device) -> None:
        """There are none, because all networks of this kind have the same settings."""

    def inpainter(
        self, networks: Networks, process: Process, times: Sequence[int]
    ) -> "LatentInpainter":
        from guided_diffusion.latent import LatentInpainter

        return LatentInpainter(
            networks["denoiser"],
            networks["autoencoder"],
            process,
            times,
            multiple=self.latent.multiple,
            eta=self.config.ddim_eta,
            image_size=self.config.image_size,
        )


_MODELS = {"repaint": PixelModel, "langevin": QuickModel, "latent": LatentModel}


def model_of(config: Config) -> PixelModel | LatentModel:
    """What a config's method and sampler stand for."""
    return _MODELS["latent" if config.latent else config.sampler](config)


def _kind_of_start(start: StartConfig | None) -> Start:
    if start is None:
        return "noise"
    return "picture" if start.path else "image"


def pixel_process(
    diffusion: DiffusionConfig, source: str, device: torch.device | str = "cpu"
) -> Process:
    """The respaced diffusion of pixels. source: the config's file. Raises UserError."""
    try:
        return respaced_process(
            beta_schedule(diffusion.noise_schedule, diffusion.diffusion_steps),
            diffusion.timestep_respacing,
            rescale_timesteps=diffusion.rescale_timesteps,
            device=device,
        )
    except ValueError as error:
        raise UserError(
            f"{source}: timestep_respacing: found {diffusion.timestep_respacing}: {error}; "
            "accepted: a number of steps that there is room for, such as 50"
        ) from error


# ---- Times -----------------------------------------------------------------------------------


def build_times(config: Config) -> list[int]:
    """The times that the sampler walks. Raises UserError if it cannot take these steps."""
    diffusion = build_process(config).diffusion
    _check_ddim_eta(config, diffusion)
    times = times_of(config)
    _check_time_shift(config, times, diffusion.num_timesteps)
    _warn_of_low_start(config, times, diffusion)
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


def _warn_of_low_start(config: Config, times: list[int], diffusion: GaussianDiffusion) -> None:
    steps = diffusion.num_timesteps
    if config.start_from or config.langevin or times[0] == steps - 1:
        return
    noise = (1 - diffusion.alphas_cumprod[times[0]]) ** 0.5
    warnings.warn(
        f"sampling starts from pure noise at step {times[0]} of {steps}, whose noise level is "
        f"{noise:.3f}, not 1: results suffer. If you lowered t_T to save time, set also "
        f"timestep_respacing: '{config.schedule.t_T}', or leave that key out",
        UserWarning,
        stacklevel=3,
    )


# ---- Device ----------------------------------------------------------------------------------


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
