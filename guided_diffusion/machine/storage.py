"""Files, on this machine or in a blob store: list, open, write atomically, keep a copy.

A path with "://" in it is remote and goes through `blobfile`; any other is local. Whatever the
place, what goes wrong is raised as OSError, its `strerror` the reason and its `filename` the path.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import socket
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from guided_diffusion.config import UserError

if TYPE_CHECKING:
    from blobfile import Context, Stat

# A request that fails for a while is repeated so often, after waits that grow: for about a minute.
RETRIES = 10
CONNECT_SECONDS, READ_SECONDS = 5, 20  # until a server that does not answer counts as failing

Errors = type[Exception] | tuple[type[Exception], ...]

PIECE = 2**23  # bytes of a file that are held in memory


@contextmanager
def writing(what: str, advice: str = "", key: str = "", errors: Errors = OSError) -> Iterator[None]:
    """Errors of a block that writes become a UserError: "cannot write …".

    what: mostly a path. advice: what to do about it. key: of the setting or option that names the
    path. errors: those that mean so.
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        line = f"{key and key + ': '}cannot write {what}: {reason}{advice and '; ' + advice}"
        raise UserError(line) from error


def is_remote(path: str) -> bool:
    """Whether the path names something in a blob store, such as gs://bucket/file."""
    return "://" in path


def exists(path: str) -> bool:
    """Whether there is a file or folder at this path. Raises OSError."""
    if not is_remote(path):
        return os.path.exists(path)
    with _blob_store(path) as store:
        return store.exists(path)


def is_dir(path: str) -> bool:
    """Whether there is a folder at this path. Raises OSError."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _blob_store(path) as store:
        return store.isdir(path)


def list_files(folder: str) -> list[str]:
    """All files under a folder, at any depth, sorted by the whole path as a string.

    Hidden files and folders (a leading dot) below it are left out. Links are followed.
    Raises OSError if the folder, or one below it, cannot be read.
    """
    if not is_remote(folder):
        return sorted(_walk(folder, parents=()))
    files = _list_blobs(folder)
    if not files and not is_dir(folder):
        raise _not_found(folder)
    return sorted(files)


def list_sizes(folder: str) -> dict[str, int]:
    """The path of every file under a folder, as `list_files` finds them, and its size in bytes.

    Empty if there is no such folder. Raises OSError if it, or one below it, cannot be read.
    """
    if is_remote(folder):
        return _list_blobs(folder)
    sizes = {}
    if os.path.isdir(folder):
        for path in _walk(folder, parents=()):
            with suppress(FileNotFoundError):  # deleted meanwhile, or a link to nowhere
                sizes[path] = os.path.getsize(path)
    return sizes


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading bytes; a remote one is read whole at once. Raises OSError."""
    if not is_remote(path):
        return open(path, "rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it is what this returns
    try:
        with _blob_store(path) as store, store.BlobFile(path, "rb") as blob:
            shutil.copyfileobj(blob, file, PIECE)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def read_start(path: str, size: int) -> bytes:
    """The first bytes of a file; of a remote one, no more than these are fetched. Raises OSError.

    What is not a plain file, such as a pipe, has none.
    """
    if not is_remote(path):
        if not os.path.isfile(path):
            return b""
        with open(path, "rb") as file:
            return file.read(size)
    with _blob_store(path) as store, store.BlobFile(path, "rb", streaming=True) as blob:
        return blob.read(size)


def name_limit(folder: str) -> int:
    """The longest name of a file in a folder, or where it will be created; see `name_length`."""
    if is_remote(folder):
        return 1024  # of a blob's whole path
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        return os.pathconf(existing, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return 255


def name_length(name: str) -> int:
    """Of a file's name as file systems count: bytes, or, on Windows, letters."""
    return len(name) if os.name == "nt" else len(os.fsencode(name))


def file_digest(path: str) -> tuple[int, str]:
    """Size and SHA-256 of a file. Raises OSError."""
    size, digest = 0, hashlib.sha256()
    with open_binary(path) as file:
        while chunk := file.read(PIECE):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()


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
    with tempfile.TemporaryDirectory() as folder:
        complete = os.path.join(folder, "complete")
        with open(complete, "wb") as file:
            yield file
        with _blob_store(path) as store:  # where a blob appears once it is uploaded
            store.copy(complete, path, overwrite=True)


def append_line(path: str, line: str) -> None:
    """Append a line of UTF-8 to a file, which is created if it or its folder is missing.

    What a killed process left of a last line stays a line of its own. A remote file is written
    anew, so it should be small and have one writer. Raises OSError.
    """
    data = f"{line}\n".encode()
    if is_remote(path):
        before = _read_if_there(path)
        write_atomically(path, before + b"\n" * _is_torn(before[-1:]) + data)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data = b"\n" * _is_torn(file.read(1)) + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move(path: str, target: str) -> None:
    """Give a file another path; missing folders are created, a file there is replaced.

    In a blob store it is copied and deleted. Raises OSError.
    """
    if is_remote(path) or is_remote(target):
        with _blob_store(path, target) as store:
            store.copy(path, target, overwrite=True)
            store.remove(path)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def remove(path: str) -> None:
    """Delete a file, if there is one. Raises OSError."""
    with suppress(FileNotFoundError):
        if not is_remote(path):
            os.remove(path)
            return
        with _blob_store(path) as store:
            store.remove(path)


def lock(path: str) -> BinaryIO:
    """Lock a file, which is created, for this process, until what this returns is closed.

    Raises BlockingIOError, whose text says who has it, if another process has locked it, and
    OSError. Where nothing can be locked, as in a blob store, it warns instead.
    """
    if is_remote(path):
        _warn_of_no_locks(path)
        return io.BytesIO()
    file = _open_lock(path)
    try:
        if not _acquire(file, wait=False):
            _warn_of_no_locks(path)
    except BaseException:
        file.close()
        raise
    return file


def check_writable(folder: str) -> None:
    """Try to write where a folder is, or will be created. Raises OSError if that is impossible."""
    if is_remote(folder):
        _check_kind(folder)
        probe = f"{folder.rstrip('/')}/{_temporary_name()}"
        write_atomically(probe, b"")
        remove(probe)
        return
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    with tempfile.TemporaryFile(dir=existing):
        return


def local_copy(path: str, cache: str) -> str:
    """The path of a copy of a remote file, downloaded if it is not in the cache as it is now.

    cache: a folder on this machine, where older versions are removed. A line, as a warning, says
    that a download begins. Of several processes one downloads and the others wait. Raises OSError.
    """
    stat = _stat(path)
    folder = os.path.join(cache, _digest(path))
    copy = os.path.join(folder, _digest(repr(stat)))
    try:
        with _open_lock(os.path.join(folder, "lock")) as file:
            locked = _acquire(file, wait=True)
            if not os.path.exists(copy):
                if locked:  # then nobody writes there, and what else there is has had its day
                    _remove_others(folder, "lock")
                line = f"downloading {path} ({stat.size / 1e6:,.1f} MB) to {folder}"
                warnings.warn(line, UserWarning, stacklevel=2)
                _download(path, stat, copy)
    except OSError as error:
        if error.filename == path:
            raise
        reason = (
            f"a copy of its {stat.size:,} bytes cannot be kept in {folder}: {error.strerror}; make "
            "room there, or set XDG_CACHE_HOME to another folder"
        )
        raise OSError(error.errno, reason, path) from error
    return copy


# ---- On this machine -------------------------------------------------------------------------


def _walk(folder: str, parents: tuple[str, ...]) -> Iterator[str]:
    real_path = os.path.realpath(folder)
    if real_path in parents:  # a link to a folder that contains it: would never end
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, (*parents, real_path))
        else:
            yield entry.path


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


def _read_if_there(path: str) -> bytes:
    try:
        with open_binary(path) as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _is_torn(last_byte: bytes) -> bool:
    """Whether a file that ends so ends in the middle of a line."""
    return last_byte not in (b"", b"\n")


def _open_lock(path: str) -> BinaryIO:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a+b")


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def _acquire(file: BinaryIO, wait: bool) -> bool:
    """Lock an open file and write into it who has it; False where there are no locks.

    Raises BlockingIOError, with what is in the file, if another has it and this is not to wait.
    """
    from filelock import lock_descriptor

    try:
        locked = lock_descriptor(file.fileno(), blocking=wait)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    if not locked:
        raise BlockingIOError(_holder(file))
    file.truncate(0)
    file.write(f" process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return True


def _holder(file: BinaryIO) -> str:
    """Who has locked a file: what it says after its first byte, which Windows lets nobody read."""
    file.seek(1)
    return file.read().decode() or "another process"


def _warn_of_no_locks(path: str) -> None:
    warnings.warn(
        f"{path}: nothing can be locked there, so two runs of the same config would write over one "
        "another: do not start a second one",
        UserWarning,
        stacklevel=3,
    )


def _remove_others(folder: str, kept: str) -> None:
    for entry in os.scandir(folder):
        if entry.name != kept:
            os.remove(entry.path)


# ---- In a blob store -------------------------------------------------------------------------

_KINDS = re.compile(
    r"gs://[^/]+(/|$)|az://[^/]+/[^/]+(/|$)|https://[^/]+\.blob\.core\.windows\.net/[^/?]+(/[^?]*)?$"
)
_ACCEPTED = (
    "a path on this machine, gs://BUCKET/PATH, az://ACCOUNT/CONTAINER/PATH, and "
    "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH without a query (?...); what is "
    "elsewhere, download first and give the file's path"
)
_LOGINS = {
    "gs": "log in with `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to the path of a key file",
    "az": "log in with `az login`, or set AZURE_STORAGE_KEY, or AZURE_CLIENT_ID, "
    "AZURE_CLIENT_SECRET and AZURE_TENANT_ID",
}
_PASSING = (0, 408, 429, 500, 502, 503, 504)  # what blobfile tries again; 0: no answer


@contextmanager
def _blob_store(
    path: str, other_path: str = "", may_list_container: bool = True
) -> Iterator[Context]:
    """blobfile's functions, for a path; what they raise leaves as OSError."""
    for each in filter(is_remote, (path, other_path)):
        _check_kind(each)
    import blobfile

    def warn(_: str) -> None:
        message = f"{path}: no answer, or an error that may pass; trying again for about a minute"
        warnings.warn(message, UserWarning, stacklevel=2)

    try:
        yield blobfile.create_context(
            retry_limit=RETRIES,
            retry_log_threshold=1,
            retry_common_log_threshold=1,
            log_callback=warn,
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            # Tokens on disk would outlive their reason: that there are no credentials, for one.
            save_access_token_to_disk=False,
            use_blind_writes=not may_list_container,
        )
    except FileNotFoundError as error:
        raise _not_found(error.filename or path) from error
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.EIO, str(error), path) from error
        raise
    except Exception as error:  # of many unrelated types, where credentials are damaged
        raise _as_os_error(error, path) from error


def _check_kind(path: str) -> None:
    if not _KINDS.match(path):
        reason = f"this kind of path is not supported; accepted: {_ACCEPTED}"
        raise OSError(errno.EINVAL, reason, path)


def _not_found(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such file, folder, bucket or container", path)


def _as_os_error(error: Exception, path: str) -> OSError:
    """An error of blobfile's in one line, with what to do about it."""
    import blobfile

    text = " ".join(str(error).split("\n", 1)[0].split())
    login = _LOGINS["gs" if path.startswith("gs://") else "az"]
    if not isinstance(error, blobfile.Error):
        return OSError(
            errno.EIO, f"{type(error).__name__}: {text}; check your credentials: {login}", path
        )
    if not isinstance(error, blobfile.RequestFailure):
        return PermissionError(errno.EACCES, f"{text}; {login}", path)
    status = error.response_status
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"access denied (HTTP {status}); {login}", path)
    if 100 <= status < 600:
        code = re.search(r"x-ms-error-code: \w+", error.error_headers or "")
        text = f"the server answers HTTP {status}{f' ({code[0]})' if code else ''}"
    else:
        text = error.message.removeprefix("request failed with exception ")
    tries = f", tried {RETRIES + 1} times" if status in _PASSING else ""
    return OSError(errno.EIO, f"{text}{tries}", path)


def _list_blobs(folder: str) -> dict[str, int]:
    """The path of each file under a folder, and its size, in few requests."""
    with _blob_store(folder) as store:
        if set("*?[]") & set(folder):
            raise OSError(errno.EINVAL, "the path of a folder may not have any of * ? [ ]", folder)
        start = store.join(folder, "")  # as the store writes paths
        names = {
            entry.path[len(start) :]: entry.stat.size
            for entry in store.scanglob(f"{start}**")
            if entry.is_file
        }
    return {
        f"{folder.rstrip('/')}/{name}": size
        for name, size in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }


def _stat(path: str) -> Stat:
    try:
        with _blob_store(path) as store:
            return store.stat(path)
    except PermissionError:
        # Without credentials, blobfile takes a container for public if its files can be listed;
        # some let all read their files, but not list them.
        with suppress(OSError), _blob_store(path, may_list_container=False) as store:
            return store.stat(path)
        raise


def _download(path: str, stat: Stat, target: str) -> None:
    with create_atomically(target) as file:
        with (
            _blob_store(path, may_list_container=False) as store,
            store.BlobFile(path, "rb", file_size=stat.size) as blob,
        ):
            shutil.copyfileobj(blob, file, PIECE)
        if file.tell() != stat.size or _stat(path) != stat:
            raise OSError(errno.EIO, "it changed while it was downloaded; start again", path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
