"""Lay out the photos that the model of photos is trained on, and those that it never sees.

    python data/prepare_photos.py FREE_PHOTOS_FOLDER data/photos

data/photo_sources.tsv names the photos, their authors and licences, and says of each whether it is
for training (train) or for tests alone (held_out). They are copied from FREE_PHOTOS_FOLDER, where
they have to be under the names in the table, to data/photos/train and data/photos/held_out.
"""

import argparse
import csv
import shutil
import sys
from pathlib import Path

TABLE = Path(__file__).parent / "photo_sources.tsv"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the folder that has the photos of the table")
    parser.add_argument("target", type=Path, nargs="?", default=Path("data/photos"))
    arguments = parser.parse_args()
    rows = read_table()
    missing = [row["file"] for row in rows if not (arguments.source / row["file"]).is_file()]
    if missing:
        print(
            f"error: {len(missing)} of {len(rows)} photos are not in {arguments.source}; the first "
            f"is {missing[0]}",
            file=sys.stderr,
        )
        return 2
    for row in rows:
        copy = arguments.target / row["use"] / row["file"]
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(arguments.source / row["file"], copy)
    uses = [row["use"] for row in rows]
    print(f"{uses.count('train')} photos to train on, {uses.count('held_out')} held out")
    return 0


def read_table() -> list[dict[str, str]]:
    """The rows of data/photo_sources.tsv: file, source, path, author, licence and so on."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


if __name__ == "__main__":
    sys.exit(main())
