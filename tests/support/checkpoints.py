"""A small network and its file; checkpoints compared and loaded."""

from pathlib import Path

from torch import nn

from guided_diffusion.checkpoints.loading import (
    Blank,
    Checkpoint,
    Part,
    check_weights,
    load_weights,
)
from guided_diffusion.config import NetworkConfig

ROOT = Path(__file__).parents[2]


TINY_FILE = ROOT / "tests" / "golden" / "tiny32.pt"


TINY = NetworkConfig(  # what TINY_FILE holds
    image_size=32,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    num_head_channels=16,
    attention_resolutions=(16,),
    resblock_updown=True,
    learn_sigma=True,
)


def checked(network: nn.Module, path: Path | str, part: Part | None = None) -> Checkpoint:
    (checkpoint,) = check_weights(Blank(network, str(path), part))
    return checkpoint


def loaded(network: nn.Module, path: Path | str, part: Part | None = None) -> nn.Module:
    return load_weights(checked(network, path, part))
