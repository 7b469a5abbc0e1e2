"""Score checkpoints of a training run by what they say of photos that they never saw.

    python data/score_denoiser.py log/train_photos/ema_0.998_*.pt

Prints the mean squared error of the predicted noise, whose variance is 1, at ten times of the
diffusion; the last column is the mean of the ten. All checkpoints see the same random squares of
the photos held out, in the scales of the config, with the same noise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.checkpoints.loading import Blank, check_weights  # noqa: E402
from guided_diffusion.config import TrainingConfig, UserError, load_training_config  # noqa: E402
from guided_diffusion.factory import pixel_process  # noqa: E402
from guided_diffusion.networks.unet import UNet  # noqa: E402
from guided_diffusion.respace import Process  # noqa: E402
from guided_diffusion.speed.choice import Speed  # noqa: E402
from guided_diffusion.speed.loading import load_network  # noqa: E402  (after the path is set)
from guided_diffusion.training.crops import RandomCrops  # noqa: E402

SHARES = (0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95)  # of all steps
BATCH = 32


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a file of weights")
    parser.add_argument("--conf_path", default="confs/train_photos.yml")
    parser.add_argument("--photos", default="data/photos/held_out", help="folder of photos")
    parser.add_argument("--number", type=int, default=256, help="how many squares (256)")
    arguments = parser.parse_args()
    try:
        config = load_training_config(arguments.conf_path)
        squares = draw_squares(config, arguments.photos, arguments.number)
        print_table(config, squares, arguments.checkpoints)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw_squares(config: TrainingConfig, folder: str, number: int) -> torch.Tensor:
    """The same squares for each call, (N, 3, S, S)."""
    scales = config.training.scales or (1.0, 1.0)
    crops = RandomCrops(folder, config.network.image_size, scales)
    return torch.stack([crops[crops.draw(0, i)][0] for i in range(number)])


def print_table(config: TrainingConfig, squares: torch.Tensor, checkpoints: Sequence[str]) -> None:
    process = pixel_process(config.diffusion, config.source)
    steps = process.diffusion.num_timesteps
    times = [int(share * steps) for share in SHARES]
    print("| checkpoint | " + " | ".join(f"t = {t}" for t in times) + " | mean |")
    print("| --- |" + " --- |" * (len(times) + 1))
    for path in checkpoints:
        errors = score(config, process, squares, path, times)
        cells = [f"{error:.4f}" for error in [*errors, sum(errors) / len(errors)]]
        print(f"| {Path(path).name} | " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def score(
    config: TrainingConfig, process: Process, squares: torch.Tensor, path: str, times: list[int]
) -> list[float]:
    """The mean squared error of the noise that a checkpoint predicts, at each of the times."""
    with torch.device("meta"):
        blank = Blank(UNet(config.network.params), path)
    (checkpoint,) = check_weights(blank)
    network = load_network(checkpoint, Speed(), torch.device("cpu"))
    noise = torch.randn(squares.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for time in times:
        total = 0.0
        for x0, eps in zip(squares.split(BATCH), noise.split(BATCH), strict=True):
            t = torch.full((len(x0),), time)
            x_t = process.diffusion.q_sample(x0, t, eps)
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            predicted = network(x_t, process.network_times[t])[:, :3]
            total += (predicted - eps).square().sum().item()
        errors.append(total / noise.numel())
    return errors


if __name__ == "__main__":
    sys.exit(main())
