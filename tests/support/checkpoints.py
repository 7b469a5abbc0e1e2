"""A small network and its file."""

from pathlib import Path

from guided_diffusion.config import (
    NetworkConfig,
)

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
