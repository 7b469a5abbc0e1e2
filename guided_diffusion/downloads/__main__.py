"""Fetch the published files that the configs in confs/ expect."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from guided_diffusion.config import UserError
from guided_diffusion.downloads.fetching import obtain
from guided_diffusion.downloads.table import DEFAULT, TABLE, Download

ROOT = Path(__file__).parents[2]
EXAMPLES = """examples:
  bash download.sh celeba data                what confs/face_example.yml needs
  bash download.sh imagenet classifier data   what the confs/test_inet256_*.yml need
  python -m guided_diffusion.downloads ldm    the same command, also on Windows

Run the same command again to resume what was interrupted; what is complete is not fetched again.
Files of yours in data/datasets are kept as they are. Unpacking ldm takes its room twice for a
while.

exit status: 0 everything asked for is there, 1 something is missing, 2 wrong usage
"""


def main(words: Sequence[str] | None = None) -> int:
    """Fetch what the words name. Paths are those of the repository, wherever it was started."""
    arguments = _parse(words)
    if arguments.list:
        print(list_files())
        return 0
    try:
        rows = choose(arguments.names or DEFAULT)
        os.chdir(ROOT)
        print("Note: the weights and the pictures have licences of their own, see README.md.")
        problems = [_obtain(row) for row in rows]
    except UserError as error:
        print(f"download.sh: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.")
        return 130
    print("\nSummary", *map(_summary, rows, problems), sep="\n")
    return 1 if any(problems) else 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.sh",
        description=f"{__doc__} Without a NAME: {' '.join(DEFAULT)}.",
        epilog=f"names:\n{list_files()}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name below")
    parser.add_argument("--list", action="store_true", help="only print the names")
    return parser.parse_args(words)


def list_files() -> str:
    """A line for each file: name, path, size, purpose, licence."""
    return "\n".join(
        f"  {row.name:21}{row.file:47}{_size(row):16}{row.purpose} ({row.licence})" for row in TABLE
    )


def _size(row: Download) -> str:
    least, most = row.size
    if not least:
        return "size unknown"
    size = f"{least / 1e9:.1f} GB" if least > 1e8 else f"{least / 1e3:.0f} kB"
    return f"{size} or more" if most == math.inf else size


def choose(names: Sequence[str]) -> list[Download]:
    """The files of these names, in this order. Raises UserError for an unknown one."""
    known = list(dict.fromkeys(row.name for row in TABLE))
    for name in names:
        if name not in known:
            raise UserError(f'unknown name "{name}"; accepted: {" ".join(known)}')
    return [row for name in names for row in TABLE if row.name == name]


def _obtain(row: Download) -> str:
    """Why a file could not be brought to its place; empty if it could."""
    try:
        obtain(row)
        return ""
    except UserError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = f"{error.name} is not installed: pip install {error.name}"
    except OSError as error:
        problem = f"cannot write {error.filename or row.file}: {error.strerror or error}"
    print(f"{row.file}: {problem}")
    return problem


def _summary(row: Download, problem: str) -> str:
    if not problem:
        return f"  there    {row.file}"
    again = "\n           then run the same command again, which checks and unpacks it"
    return (
        f"  MISSING  {row.file}\n"
        f"           why: {problem}\n"
        f"           by hand: open {row.page} in a browser\n"
        f"           and save the file as {ROOT / (row.archive or row.file)}"
        f"{again if row.archive else ''}"
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in order with the progress, also in a log
    sys.exit(main())
