"""Train a denoiser on a folder of images. To resume, run the same command again."""

import argparse
import sys

from guided_diffusion.config import UserError, load_training_config

EXAMPLES = """examples:
  python data/make_portraits.py data/portraits --number 30000
  python train.py --conf_path confs/train_portraits.yml
  python train.py --conf_path confs/train_portraits.yml --set batch_size=64 --set lr=0.0003

A run that was stopped, by whatever, goes on from its newest complete checkpoint in log_dir:
run the same command again.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conf_path", required=True, help="a YAML file, see confs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key"
    )
    arguments = parser.parse_args()
    try:
        config = load_training_config(arguments.conf_path, arguments.set)
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config) -> None:
    from guided_diffusion.factory import build_trainer, sample_writer
    from guided_diffusion.training.loop import train

    trainer, images = build_trainer(config)
    train(
        trainer,
        images,
        config.training.log_dir,
        write_samples=sample_writer(config, trainer.device),
        show_progress=config.show_progress,
    )


if __name__ == "__main__":
    sys.exit(main())
