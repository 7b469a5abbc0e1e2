"""Train a denoiser on a folder of images. To resume, run the same command again."""

import argparse
import sys
import warnings

from guided_diffusion.config import TrainingConfig, UserError, load_training_config
from guided_diffusion.machine.ranks import ALONE, World, read_world

EXAMPLES = """examples:
  python data/make_portraits.py data/portraits --number 30000
  python train.py --conf_path confs/train_portraits.yml
  python train.py --conf_path confs/train_portraits.yml --set batch_size=64 --set lr=0.0003
  torchrun --nproc_per_node=8 train.py --conf_path confs/train_portraits.yml

A run that was stopped, by whatever, goes on from its newest complete checkpoint in log_dir:
run the same command again, with as many processes as you like.
"""


def main() -> int:
    arguments = parse_arguments()
    world = ALONE
    try:
        world = read_world()
        warnings.showwarning = lambda text, *_: world.say(f"warning: {text}", sys.stderr)
        run(load_training_config(arguments.conf_path, arguments.set), world)
    except UserError as error:
        world.say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        world.say("stopped; run the same command again to resume", sys.stderr)
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


def run(config: TrainingConfig, world: World) -> None:
    # Torch takes seconds to import; a mistake in the config is reported before.
    from guided_diffusion.training.build import build_trainer, sample_writer
    from guided_diffusion.training.loop import train
    from guided_diffusion.training.ranks import reporting_lost_processes

    log_dir = config.training.log_dir
    with reporting_lost_processes():
        trainer, images = build_trainer(config, world)
        trainer.resume(log_dir)
        if world.rank == 0:
            world.say(f"{config.name}: {trainer.describe(len(images))}")
        draw = sample_writer(config, trainer.device, len(images.class_folders))
        train(trainer, images, log_dir, write_samples=draw, show_progress=config.show_progress)
    if world.rank == 0:
        world.say(f"weights, for model_path: {log_dir}/{trainer.checkpoint_files(trainer.step)[1]}")


if __name__ == "__main__":
    sys.exit(main())
