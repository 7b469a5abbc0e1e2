"""Bring a file's bytes here, over https or from Google Drive, and go on where that stopped."""

from __future__ import annotations

import glob
import os
import re
import ssl
import time
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from guided_diffusion.config import UserError
from guided_diffusion.downloads.checks import QUOTA

WAITS = (1, 2, 4)  # seconds before each further try
SILENCE = 60  # seconds until a server that sends nothing counts as failing
BUSY = (408, 429, 500, 502, 503, 504)
PIECE = 2**16  # bytes


def over_https(url: str, part: str) -> None:
    """Append to `part` what it lacks. Raises UserError; what has come by then stays."""
    for wait in (*WAITS, None):
        try:
            return _fetch_rest(url, part)
        except (OSError, HTTPException) as error:
            if wait is None or not _may_pass(error):
                raise _failure(f"the download failed: {_reason(error)}", part) from error
            time.sleep(wait)


def _fetch_rest(url: str, part: str) -> None:
    there = os.path.getsize(part) if os.path.exists(part) else 0
    request = Request(url, headers={"User-Agent": "RePaint"})  # some servers refuse Python's name
    if there:
        request.add_header("Range", f"bytes={there}-")
    try:
        answer = urlopen(request, timeout=SILENCE, context=_certificates())
    except HTTPError as error:
        if there and error.code == 416:  # no bytes are left to send
            return
        raise
    with answer:
        if answer.status != 206:
            there = 0  # the whole file comes
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            raise HTTPException("the server sent another part of the file than it was asked for")
        _append(answer, part, there)


def _append(answer: HTTPResponse, part: str, there: int) -> None:
    from tqdm import tqdm

    length = answer.headers.get("Content-Length")
    total = there + int(length) if length else None
    settings = {"unit": "B", "unit_scale": True, "disable": None}  # None: on terminals only
    with (
        open(part, "ab" if there else "wb") as file,
        tqdm(total=total, initial=there, **settings) as bar,
    ):
        while piece := answer.read(PIECE):
            file.write(piece)
            bar.update(len(piece))
    if total is not None and os.path.getsize(part) < total:
        raise ConnectionError(f"the connection broke off before byte {total}")


def _certificates() -> ssl.SSLContext:
    """Python on macOS may know none; certifi, which comes with gdown, does."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code in BUSY
    if isinstance(error, URLError):  # no connection
        return isinstance(error.reason, TimeoutError)
    return isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError, HTTPException))


def from_drive(drive_id: str, part: str) -> None:
    """Make `part`, through gdown, which keeps what it has so far beside it. Raises UserError."""
    import gdown

    try:
        gdown.download(id=drive_id, output=part, resume=True, timeout=SILENCE)
    except Exception as error:  # gdown raises its own, and those of its libraries
        reason = _reason(error)
        if re.search("quota|too many users|many accesses", reason, re.I):
            raise UserError(QUOTA) from error
        raise _failure(f"gdown failed: {reason}", part) from error


def _reason(error: BaseException) -> str:
    """One line. Libraries wrap the error that tells what is wrong."""
    inner = getattr(error, "reason", None) or (error.args or [None])[0]
    if isinstance(inner, BaseException):
        return _reason(inner)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _failure(problem: str, part: str) -> UserError:
    if glob.glob(f"{glob.escape(part)}*"):  # gdown adds letters of its own to the name
        problem += f"; run the same command again to resume, or delete {part}* to start afresh"
    return UserError(problem)
