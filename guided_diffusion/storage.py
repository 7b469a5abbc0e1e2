"""Files, on this machine or in a blob store: list, open, write atomically.

A path with "://" in it is remote and goes through `blobfile`; any other is local. Whatever the
place, what goes wrong is raised as OSError.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO


def is_remote(path: str) -> bool:
    """Whether the path names something in a blob store, such as gs://bucket/file."""
    return "://" in path


def exists(path: str) -> bool:
    """Whether there is a file or folder at this path."""
    if not is_remote(path):
        return os.path.exists(path)
    with _blobfile() as blobfile:
        return blobfile.exists(path)


def is_dir(path: str) -> bool:
    """Whether there is a folder at this path."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _blobfile() as blobfile:
        return blobfile.isdir(path)


def list_files(folder: str) -> list[str]:
    """All files under a folder, at any depth, sorted by the whole path as a string.

    Hidden files and folders (a leading dot) below it are left out. Links are followed.
    Raises OSError if the folder, or one below it, cannot be read.
    """
    return sorted(_walk(folder, parents=()))


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading bytes. Raises OSError."""
    if not is_remote(path):
        return open(path, "rb")
    with _blobfile() as blobfile:
        return blobfile.BlobFile(path, "rb")


def write_atomically(path: str, data: bytes) -> None:
    """Write a file so that it has its final name only once it is complete, also after a crash.

    Missing parent folders are created; an older file of that name is replaced. Raises OSError.
    """
    with create_atomically(path) as file:
        file.write(data)


@contextmanager
def create_atomically(path: str) -> Iterator[BinaryIO]:
    """A file open for writing bytes, which gets its final name when the block ends well.

    Otherwise as `write_atomically`.
    """
    if not is_remote(path):
        with _create_atomically_here(path) as file:
            yield file
        return
    with _blobfile() as blobfile, blobfile.BlobFile(path, "wb") as file:
        yield file  # a blob appears when its upload is closed


def check_writable(folder: str) -> None:
    """Try to write where a folder is, or will be created. Raises OSError if that is impossible."""
    if is_remote(folder):
        with _blobfile() as blobfile:
            probe = blobfile.join(folder, _temporary_name())
            blobfile.write_bytes(probe, b"")
            blobfile.remove(probe)
        return
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    with tempfile.TemporaryFile(dir=existing):
        return


@contextmanager
def _blobfile() -> Iterator[ModuleType]:
    """The blobfile module, imported only where it is needed; its errors leave as OSError."""
    import blobfile

    try:
        yield blobfile
    except blobfile.Error as error:
        raise OSError(str(error)) from error


def _walk(folder: str, parents: tuple[str, ...]) -> Iterator[str]:
    real_path = os.path.realpath(folder)
    if real_path in parents:  # a link to a folder that contains it: would never end
        return
    for name, path, is_folder in _scan(folder):
        if name.startswith("."):
            continue
        if is_folder:
            yield from _walk(path, (*parents, real_path))
        else:
            yield path


def _scan(folder: str) -> list[tuple[str, str, bool]]:
    """(name, path, is it a folder) of each thing directly in a folder."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return [(entry.name, entry.path, entry.is_dir()) for entry in entries]
    with _blobfile() as blobfile:
        return [(entry.name, entry.path, entry.is_dir) for entry in blobfile.scandir(folder)]


@contextmanager
def _create_atomically_here(path: str) -> Iterator[BinaryIO]:
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / _temporary_name()
    try:
        # Not the tempfile module: its files are readable by their owner alone.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after the rename there is nothing to remove


def _temporary_name() -> str:
    """A name that no other process uses; hidden, so that no listing takes it for a result."""
    return f".{uuid.uuid4().hex}.tmp"
