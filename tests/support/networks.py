"""Small networks."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import nn

from guided_diffusion.config import Config, load_config
from guided_diffusion.networks.params import ClassifierParams, UNetParams
from guided_diffusion.networks.unet import Classifier, UNet
from tests.support.filled_weights import filled

GOLDEN = Path(__file__).parents[1] / "golden"


NETWORKS = json.loads((GOLDEN / "network_forward.json").read_text())


Shapes = dict[str, tuple[int, ...]]


TINY = UNetParams(
    image_size=16,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_heads=2,
)


@cache
def on_meta(params: UNetParams | ClassifierParams) -> nn.Module:
    with torch.device("meta"):
        return UNet(params) if isinstance(params, UNetParams) else Classifier(params)


def shapes_of(params: UNetParams | ClassifierParams) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in on_meta(params).state_dict().items()}


def filled_network(params: UNetParams | ClassifierParams) -> nn.Module:
    """A network with the filled weights of the golden ones."""
    network = UNet(params) if isinstance(params, UNetParams) else Classifier(params)
    network.load_state_dict(filled(shapes_of(params)))
    return network.eval()


def load_written(folder: Path, keys: dict) -> Config:
    """A config by way of a file, as users write it."""
    path = folder / "conf.yml"
    path.write_text(yaml.safe_dump({"model_path": "none.pt", **keys}))
    return load_config(str(path), require_data=False)


def golden_params(name: str, folder: Path) -> UNetParams | ClassifierParams:
    keys = NETWORKS[name]["config"]
    if not name.startswith("classifier"):
        return load_written(folder, keys).network.params
    config = load_written(folder, keys | {"classifier_path": "none.pt", "classifier_scale": 1.0})
    return config.classifier.params(config.network.image_size)


def pool_params(pool: str, folder: Path) -> ClassifierParams:
    return replace(golden_params("classifier64", folder), pool=pool)
