"""From a training config to what trains, and to what draws samples of it."""

from collections.abc import Callable
from dataclasses import replace

import torch

from guided_diffusion.config import TrainingConfig, to_yaml_dict
from guided_diffusion.denoiser import network_denoiser
from guided_diffusion.factory import pick_device, pixel_process
from guided_diffusion.images.files import encode_png, picture_grid
from guided_diffusion.images.tensors import to_bytes
from guided_diffusion.inpainter import PixelInpainter
from guided_diffusion.machine import storage
from guided_diffusion.machine.ranks import ALONE, World
from guided_diffusion.networks.unet import UNet
from guided_diffusion.scheduler import plain_times
from guided_diffusion.training.crops import training_images
from guided_diffusion.training.data import TrainingImages
from guided_diffusion.training.loop import Objective, Trainer
from guided_diffusion.training.ranks import Processes, check_batch_size

PREVIEW_STEPS = 50  # of the samples that a training run shows


def build_trainer(config: TrainingConfig, world: World = ALONE) -> tuple[Trainer, TrainingImages]:
    """A network with fresh weights and what trains it, and its images. Raises UserError.

    world: the processes that train it together; all of them call this.
    """
    check_batch_size(config.training.batch_size, world)
    device = pick_device(config.device, world)
    network = config.network
    images = training_images(config.training, network.image_size, network.in_channels)
    if network.class_cond:
        images.check_classes(network.num_classes)
    processes = Processes(world, device)
    processes.check_same("config", to_yaml_dict(config))
    processes.check_same("data_dir", images.paths)
    objective = Objective(
        pixel_process(config.diffusion, config.source, device),
        predict_xstart=config.diffusion.predict_xstart,
        use_kl=config.diffusion.use_kl,
        class_cond=config.network.class_cond,
    )
    torch.manual_seed(config.seed)  # the fresh weights
    network = UNet(config.network.params)
    trainer = Trainer(network, objective, config.training, seed=config.seed, processes=processes)
    return trainer, images


def sample_writer(
    config: TrainingConfig, device: torch.device, num_classes: int
) -> Callable[[dict[str, torch.Tensor], str], None]:
    """A function (weights, path) that draws a grid of free samples, from the same noise always.

    num_classes: of those that are being learnt; a class-conditional network draws among them.
    """
    # Every n-th step leaves out the very last ones, which are nothing but noise.
    total = config.diffusion.diffusion_steps
    steps = len(range(0, total, max(1, total // PREVIEW_STEPS)))
    preview = replace(config.diffusion, timestep_respacing=f"ddim{steps}")
    process = pixel_process(preview, config.source, device)
    with torch.device("meta"):
        network = UNet(config.network.params).eval()
    inpainter = PixelInpainter(
        network_denoiser(
            network,
            process,
            class_cond=config.network.class_cond,
            predict_xstart=config.diffusion.predict_xstart,
        ),
        process.diffusion,
        plain_times(process.diffusion.num_timesteps),
        config.network.image_size,
        num_classes=num_classes,
        channels=config.network.in_channels,
        merge_known=False,
    )
    number, size = config.training.sample_number, config.network.image_size

    def write(weights: dict[str, torch.Tensor], path: str) -> None:
        network.load_state_dict(weights, assign=True)
        blank = torch.zeros(number, 3, size, size)
        pictures = to_bytes(inpainter.sample(blank, blank, seeds=range(number)))
        with storage.writing(path):
            storage.write_atomically(path, encode_png(picture_grid(pictures)))

    return write
