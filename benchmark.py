"""Measure how fast a config's network runs on this machine; no checkpoint is needed."""

import argparse
import json
import signal
import sys
import warnings

from guided_diffusion.config import Config, UserError, load_config

EXAMPLES = """examples:
  python benchmark.py --conf_path confs/demo.yml
  python benchmark.py --conf_path confs/face_example.yml --set fast=true
  python benchmark.py --conf_path confs/face_example.yml --precision bf16 --batch 4 --json
"""


def main() -> int:
    warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)
    # Where a process is told to end, it still has to delete gigabytes of weights.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        arguments = parse_arguments()
        settings = arguments.set
        if arguments.precision:
            settings = [*settings, f"precision={arguments.precision}"]
        config = load_config(arguments.conf_path, settings, require_data=False)
        run(config, arguments.batch, arguments.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--conf_path", required=True, metavar="FILE", help="a YAML file, such as those in confs/")
    add("--precision", metavar="P", help="the same as --set precision=P")
    add("--batch", type=batch_size, default=1, metavar="N", help="images at a time (1)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="use this value instead of the file's; KEY is a dotted path; repeatable",
    )
    add("--json", action="store_true", help="print one JSON object, not a table")
    return parser.parse_args()


def batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--batch: found {text}; accepted: a whole number >= 1")
    return int(text)


def run(config: Config, batch: int, as_json: bool) -> None:
    # Torch takes seconds to import; a mistake in the config is reported before.
    from guided_diffusion.benchmark import network

    figures = network.measure(config, batch)
    print(json.dumps(figures) if as_json else network.describe(figures))


if __name__ == "__main__":
    sys.exit(main())
