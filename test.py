"""Inpaint every image that a config names. To go on after a stop, run the same command again."""

import argparse
import sys
import warnings
from functools import partial

from guided_diffusion.config import Config, UserError, load_config
from guided_diffusion.machine.ranks import ALONE, World, join, read_world
from guided_diffusion.machine.signals import Interrupted

EXAMPLES = """examples:
  python test.py --conf_path confs/demo.yml
  python test.py --conf_path confs/face_example.yml --dry-run
  python test.py --conf_path confs/face_example.yml --set seed=7 --set paste_known=true
  torchrun --nproc_per_node=8 test.py --conf_path confs/test_c256_thick.yml
"""


def main() -> int:
    arguments = parse_arguments()
    world = ALONE
    try:
        world = read_world()
        warnings.showwarning = lambda text, *_: world.say(f"warning: {text}", sys.stderr)
        run(load_config(arguments.conf_path, arguments.set), world, arguments)
    except UserError as error:
        world.say(f"error: {error}", sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        again = "the same command again" + ", without --overwrite" * arguments.overwrite
        world.say(f"stopped; to go on, run {again}", sys.stderr)
        return 128 + getattr(stop, "number", 2)  # Ctrl-C is SIGINT, 2
    return 0


def parse_arguments() -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=as_it_is)
    add = parser.add_argument
    add("--conf_path", required=True, metavar="FILE", help="a YAML file, such as those in confs/")
    set_help = "use this value instead of the file's; KEY is a dotted path; repeatable"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    add("--overwrite", action="store_true", help="make all results again, the finished ones too")
    add("--dry-run", action="store_true", help="check everything and print the plan, no more")
    add("--check-weights", action="store_true", help="as --dry-run, but also try the network")
    add("--preview", metavar="OUT.png", help="draw the inputs, as the network will see them")
    return parser.parse_args()


def run(config: Config, world: World, arguments: argparse.Namespace) -> None:
    # Torch takes seconds to import; a mistake in the config is reported before.
    from guided_diffusion import factory
    from guided_diffusion.run import runner
    from guided_diffusion.run.plan import make_job
    from guided_diffusion.run.recipe import Recipe

    if arguments.preview is not None:
        from guided_diffusion.run.preview import write_preview

        return world.say(write_preview(config, arguments.preview))
    device = factory.pick_device(config.device, world)
    speed = factory.choose_speed(config, device)
    recipe, team = Recipe(config, device, speed), join(world)
    times = team.share("times", partial(factory.build_times, config))
    dry_run = arguments.dry_run or arguments.check_weights
    job = make_job(config, times, recipe, team, arguments.overwrite, dry_run)
    load_inpainter = partial(factory.build_inpainter, times=times, device=device, speed=speed)
    if arguments.check_weights:
        runner.warn_of_doubts(job.plan, load_inpainter(config))
    if dry_run:
        factory.check_checkpoints(config)
        in_order = "everything is in order; nothing was sampled or written (--dry-run)"
        return world.say(f"{job.describe()}\n{in_order}")
    runner.run(job, load_inpainter)


if __name__ == "__main__":
    sys.exit(main())
