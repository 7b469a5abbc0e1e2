"""Whether a file is the published one, and whole."""

from __future__ import annotations

import hashlib
import math
import os
import re
import zipfile
import zlib

from guided_diffusion.downloads.table import Download

QUOTA = "Google Drive's daily quota for this file is used up"
# What zipfile raises for damaged archives; OSError where it would seek to before the start.
_NO_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError)


def find_problem(row: Download, path: str, zipped: bool = False) -> str:
    """Why a file is not the download, or with `zipped` not its archive; empty if it is."""
    if is_web_page(path):
        page = "a web page came instead of the file"
        return f"{QUOTA} ({page})" if row.on_drive else page
    return _zip_problem(path) if zipped else _weights_problem(row, path)


def _zip_problem(path: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _NO_ZIP:
        return "damaged or not a zip file"
    return f"damaged zip file: {damaged} in it is not whole" if damaged else ""


def _weights_problem(row: Download, path: str) -> str:
    size, (least, most) = os.path.getsize(path), row.size
    if not least <= size <= most:
        more = {least: "", math.inf: " or more"}.get(most, f" to {most}")
        return f"wrong size: {size} bytes, expected {least}{more}"
    start = _first_bytes(path)[:2]
    # torch.save writes a zip archive, and before version 1.6 a bare pickle.
    if start not in (b"PK", b"\x80\x02"):
        return f"not a PyTorch file: it starts with the bytes {start.hex()}"
    # The list is at the end of a zip archive, so one that has it is not cut off.
    if start == b"PK" and most == math.inf and not is_torch_archive(path):
        return "damaged or not a PyTorch file: it is no zip archive with a data.pkl"
    digest = _digest(path) if row.sha256 else ""
    if not digest.startswith(row.sha256):
        return f"right size, but other content: its SHA-256 is {digest}, expected {row.sha256}"
    return ""


def is_torch_archive(path: str) -> bool:
    """Whether a file is a zip archive as torch.save writes them, going by the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.fullmatch(r"[^/]*/data\.pkl", name) for name in archive.namelist())
    except _NO_ZIP:
        return False


def is_web_page(path: str) -> bool:
    return re.search(rb"<(!doctype )?html", _first_bytes(path), re.I) is not None


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
