"""Write a checkpoint in half precision, to half of its size: for weights that come along.

python data/halve_weights.py log/train_photos/ema_0.998_005000.pt data/pretrained/photos64.pt
"""

import argparse
import io
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.checkpoints.loading import load_state_dict  # noqa: E402  (after the path)
from guided_diffusion.config.errors import exit_status  # noqa: E402
from guided_diffusion.machine import storage  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a file of weights, as train.py writes it")
    parser.add_argument("out", help="where the smaller one goes")
    arguments = parser.parse_args()
    return exit_status(lambda: halve(arguments.checkpoint, arguments.out))


def halve(path: str, out: str) -> None:
    """Raises UserError if the file cannot be read or written."""
    halves = {name: weight.half() for name, weight in load_state_dict(path).items()}
    content = io.BytesIO()
    torch.save(halves, content)
    with storage.writing(out):
        storage.write_atomically(out, content.getvalue())


if __name__ == "__main__":
    sys.exit(main())
