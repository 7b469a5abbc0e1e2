"""Measure results: distance to the truth, over whole images and over the holes alone."""

import argparse
import sys
import warnings
from functools import partial

from guided_diffusion.config.errors import exit_status
from guided_diffusion.evaluation import paper, table

EXAMPLES = """examples:
  python evaluate.py --results log/demo/inpainted --gt log/demo/gt --masks log/demo/gt_keep_mask
  python evaluate.py --results mine --gt truth --out metrics.csv
  python evaluate.py --paper log/test_* --out paper.csv
"""


def main() -> int:
    return exit_status(partial(run, parse_arguments()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", metavar="DIR", help="pictures to measure; x_0, x_1, ... are samples of x")
    add("--gt", metavar="DIR", help="the truth, pictures of the same names and sizes")
    add("--masks", metavar="DIR", help="white = known, black = hole; measures the hole as well")
    add("--paper", nargs="+", metavar="DIR", help="folders of runs: the paper's table beside ours")
    add("--out", metavar="FILE", help="write the figures as CSV: a line an image, or a cell")
    arguments = parser.parse_args()
    folders = [arguments.results, arguments.gt, arguments.masks]
    if any(folders) if arguments.paper else not all(folders[:2]):
        parser.error("give --results and --gt, or --paper alone")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)
    if arguments.out:
        table.check_out(arguments.out)
    if arguments.paper:
        scores = paper.compare(arguments.paper)
    else:
        networks = table.load_networks()
        scores = table.measure(arguments.results, arguments.gt, arguments.masks, networks)
    print(scores.to_markdown())
    if arguments.out:
        table.write_text(arguments.out, scores.to_csv())


if __name__ == "__main__":
    sys.exit(main())
