"""Bring a published file to its place, where only what is complete ever appears."""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from guided_diffusion.config import UserError
from guided_diffusion.downloads import transport
from guided_diffusion.downloads.checks import find_problem, is_torch_archive, is_web_page
from guided_diffusion.downloads.table import Download

PICTURES = ("datasets/gts/", "datasets/gt_keep_masks/")  # in the zip, and below data/


def obtain(row: Download) -> None:
    """Bring a file to its place, and unpack it. Raises UserError, OSError, ModuleNotFoundError."""
    if row.unpack == "checkpoint" and _is_there(row, row.file):
        return
    _fetch(row, row.archive or row.file)
    if row.unpack == "pictures":
        _unpack_pictures(row.archive)
    elif row.unpack == "checkpoint":
        _unpack_checkpoint(row)


# ---- Download ----


def _fetch(row: Download, file: str) -> None:
    part = f"{file}.part"
    if _is_there(row, file):
        return
    os.makedirs(os.path.dirname(file), exist_ok=True)
    if not _leftover_is_complete(row, part):
        print(f"{file}: downloading from {row.page}")
        (transport.from_drive if row.on_drive else transport.over_https)(row.address, part)
        if problem := find_problem(row, part, bool(row.archive)):
            os.remove(part)
            raise UserError(f"{problem}; removed, the next run starts afresh")
    os.replace(part, file)


def _is_there(row: Download, file: str) -> bool:
    """Another file of that name is set aside: somebody else may have put it there."""
    if not os.path.exists(file):
        return False
    problem = find_problem(row, file, file == row.archive)
    if not problem:
        print(f"{file}: already complete, skipped")
        return True
    if os.path.exists(f"{file}.bad"):
        raise UserError(
            f"the file that is there is not the published one ({problem}): move it away"
        )
    os.rename(file, f"{file}.bad")
    print(f"{file}: {problem}; moved to {file}.bad")
    return False


def _leftover_is_complete(row: Download, part: str) -> bool:
    """A .part of an earlier run: complete, or else resumed if it can be.

    gdown cannot resume it: it has a partial file of its own, and renames that to .part at its end.
    """
    if not os.path.isfile(part):
        return False
    problem, most = find_problem(row, part, bool(row.archive)), row.size[1]
    # Of a file whose size is not known, the server tells whether more of it is to come.
    if not problem and (row.on_drive or most < math.inf):
        return True
    if row.on_drive or is_web_page(part) or os.path.getsize(part) >= most:
        os.remove(part)
        print(f"{part}: {problem}; removed, starting afresh")
    else:
        print(f"{part}: {os.path.getsize(part)} bytes are there, resuming")
    return False


# ---- Unpack ----


def _unpack_pictures(path: str) -> None:
    with _staging(path) as folder, zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith(PICTURES)]
        if not all(any(name.startswith(start) for name in names) for start in PICTURES):
            raise UserError(
                f"{path} holds no datasets/gts and datasets/gt_keep_masks: delete it and run again"
            )
        if unsafe := [name for name in names if ".." in name.split("/")]:
            raise UserError(f"{path} holds the unsafe name {unsafe[0]}: delete it and run again")
        for name in names:
            target = f"data/{name}"
            if not name.endswith("/") and not os.path.exists(target):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(archive.extract(name, folder), target)
    print("data/datasets: unpacked; files that were already there are left as they are")


def _unpack_checkpoint(row: Download) -> None:
    """The archive holds the checkpoint or, as a checkpoint is a zip archive too, is it."""
    path = row.archive
    if is_torch_archive(path):
        return _move_checkpoint(row, path)
    with _staging(path) as folder, zipfile.ZipFile(path) as archive:
        # Zips made on a Mac also have __MACOSX/._NAME: attributes of the file.
        names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
        found = [name for name in names if name.endswith(".ckpt")]
        if len(found) != 1:
            see = f"see python -m zipfile -l {path}"
            raise UserError(f"{path} holds {len(found)} *.ckpt files, not one: {see}")
        print(f"{path}: unpacking, which takes the room twice")
        _move_checkpoint(row, archive.extract(found[0], folder))
    os.remove(path)
    print(f"{row.file}: unpacked; {path} is not needed any more, removed")


def _move_checkpoint(row: Download, path: str) -> None:
    if problem := find_problem(row, path):
        raise UserError(
            f"{row.archive} does not hold the published checkpoint ({problem}): "
            "delete it and run again"
        )
    os.replace(path, row.file)


@contextmanager
def _staging(path: str) -> Iterator[str]:
    """A folder to unpack in, so that a killed run leaves no half of a file in its place."""
    folder = f"{path}.unpacked"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
