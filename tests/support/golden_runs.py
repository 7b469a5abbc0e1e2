"""Configs of the golden runs."""

import shutil
from pathlib import Path

import torch
from torch import nn

from guided_diffusion.config import load_config
from guided_diffusion.networks.unet import Classifier, UNet
from tests.support.filled_weights import filled

GOLDEN = Path(__file__).parents[1] / "golden"


def write_filled(network: nn.Module, path: Path) -> None:
    """The network's checkpoint, its weights drawn from their names."""
    torch.save(filled({key: tensor.shape for key, tensor in network.state_dict().items()}), path)


def prepare(case: str, folder: Path) -> None:
    """Copy a golden case, with the checkpoints that its config names."""
    shutil.copytree(GOLDEN / "e2e" / case, folder)
    config = load_config(str(folder / "conf.yml"))
    with torch.device("meta"):
        if config.model_path == "model_fill":
            write_filled(UNet(config.network.params), folder / "model_fill")
        else:
            shutil.copy(GOLDEN / config.model_path, folder)
        if config.classifier:
            params = config.classifier.params(config.network.image_size)
            write_filled(Classifier(params), folder / config.classifier.path)
