"""Measure results: distance to the truth, over whole images and over the holes alone."""

import argparse
import sys

from guided_diffusion import evaluation, paper_table
from guided_diffusion.config import UserError

EXAMPLES = """examples:
  python evaluate.py --results log/demo/inpainted --gt log/demo/gt --masks log/demo/gt_keep_mask
  python evaluate.py --results mine --gt truth --out metrics.csv
  python evaluate.py --paper log/test_* --out paper.csv
  python evaluate.py --run-study portraits
"""


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", metavar="DIR", help="pictures to measure; x_0, x_1, ... are samples of x")
    add("--gt", metavar="DIR", help="the truth, pictures of the same names and sizes")
    add("--masks", metavar="DIR", help="white = known, black = hole; measures the hole as well")
    add("--paper", nargs="+", metavar="DIR", help="folders of runs: the paper's table beside ours")
    study_help = "inpaint portraits with the embedded model, measure, write a page (up to an hour)"
    add("--run-study", choices=["portraits"], help=study_help)
    out_help = "write the figures as CSV: a line an image, or a cell; of a study, the page (.md)"
    add("--out", metavar="FILE", help=out_help)
    arguments = parser.parse_args()
    folders = [arguments.results, arguments.gt, arguments.masks]
    others = [arguments.paper, arguments.run_study]
    if all(others) or (any(folders) if any(others) else not all(folders[:2])):
        parser.error("give --results and --gt, or --paper alone, or --run-study alone")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    if arguments.run_study:
        from guided_diffusion.study import run_portraits

        return run_portraits(arguments.out)
    if arguments.out:
        evaluation.check_out(arguments.out)
    if arguments.paper:
        table = paper_table.compare(arguments.paper)
    else:
        networks = evaluation.load_networks()
        table = evaluation.evaluate(arguments.results, arguments.gt, arguments.masks, networks)
    print(table.to_markdown())
    if arguments.out:
        evaluation.write_text(arguments.out, table.to_csv())


if __name__ == "__main__":
    sys.exit(main())
