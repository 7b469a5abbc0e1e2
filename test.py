"""Inpaint every image that a config names."""

import argparse
import sys
import warnings

from guided_diffusion.config import Config, UserError, load_config

EXAMPLES = """examples:
  python test.py --conf_path confs/demo.yml
  python test.py --conf_path confs/face_example.yml --dry-run
  python test.py --conf_path confs/face_example.yml --set seed=7 --set paste_known=true
  python test.py --conf_path confs/face_example.yml --set schedule_jump_params.jump_n_sample=5
"""


def main() -> int:
    arguments = parse_arguments()
    warnings.showwarning = show_warning
    try:
        run(load_config(arguments.conf_path, arguments.set), arguments.dry_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the images that were finished are written", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--conf_path", required=True, metavar="FILE", help="a YAML file, such as those in confs/"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="use this value instead of the file's; KEY is a dotted path; repeatable",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the plan, but sample and write nothing",
    )
    return parser.parse_args()


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(config: Config, dry_run: bool) -> None:
    # Torch takes seconds to import; a mistake in the config is reported before.
    from guided_diffusion import factory, runner

    device = factory.pick_device(config.device)
    speed = factory.choose_speed(config, device)
    times = factory.build_times(config)
    plan = runner.make_plan(config, times, device)
    if dry_run:
        factory.check_checkpoints(config)
        print(plan.describe(device, speed))
        print("everything is in order; nothing was sampled or written (--dry-run)")
        return
    inpainter = factory.build_inpainter(plan.config, times, speed)
    plan = runner.fit_batch_size(plan, inpainter)
    print(plan.describe(device, speed), flush=True)
    runner.run(plan, inpainter, speed)
    print(f"results: {plan.dataset.inpainted_dir} (settings and times: {plan.record_path})")


if __name__ == "__main__":
    sys.exit(main())
