"""Train a denoiser on a folder of images. To resume, run the same command again."""

import argparse
import sys
from typing import TYPE_CHECKING

from guided_diffusion.config import TrainingConfig, UserError, load_training_config

if TYPE_CHECKING:
    from guided_diffusion.training.loop import Trainer

EXAMPLES = """examples:
  python data/make_portraits.py data/portraits --number 30000
  python train.py --conf_path confs/train_portraits.yml
  python train.py --conf_path confs/train_portraits.yml --set batch_size=64 --set lr=0.0003

A run that was stopped, by whatever, goes on from its newest complete checkpoint in log_dir:
run the same command again.
"""


def main() -> int:
    arguments = parse_arguments()
    try:
        run(load_training_config(arguments.conf_path, arguments.set))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conf_path", required=True, help="a YAML file, see confs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config (a dotted path and a YAML value); repeatable",
    )
    return parser.parse_args()


def run(config: TrainingConfig) -> None:
    # Torch takes seconds to import; a mistake in the config is reported before.
    from guided_diffusion.factory import build_trainer, sample_writer
    from guided_diffusion.training.loop import train

    log_dir = config.training.log_dir
    trainer, images = build_trainer(config)
    trainer.resume(log_dir)
    print(describe(config, trainer, len(images)), flush=True)
    write_samples = sample_writer(config, trainer.device, len(images.class_folders))
    train(trainer, images, log_dir, write_samples=write_samples, show_progress=config.show_progress)
    print(f"weights, for model_path: {log_dir}/{trainer.checkpoint_files(trainer.step)[1]}")


def describe(config: TrainingConfig, trainer: "Trainer", images: int) -> str:
    """Two lines for people."""
    params = config.training
    weights = sum(weight.numel() for weight in trainer.network.parameters())
    return (
        f"{config.name}: a network of {weights / 1e6:.1f} M weights, {images:,} image(s) of "
        f"{params.data_dir}, {params.total_steps:,} steps of batch size {params.batch_size}\n"
        f"seed {config.seed}, device {trainer.device}, log_dir {params.log_dir}, "
        + (f"resuming from step {trainer.step}" if trainer.step else "starting afresh")
    )


if __name__ == "__main__":
    sys.exit(main())
