"""What is finished, so that a run goes on where an earlier one was stopped.

Beside the folder of the results lies one of records, `inpainted.run` beside `inpainted`. In it each
rank appends to a file of its own, images-RANK.jsonl, one JSON object a line, never changed:

    {"run": 2, "seed": 5, "settings": {...}, "digest": D}       a run begins
    {"run": 2, "name": "x.png", "redo": "the image changed"}    an earlier result was set aside
    {"run": 2, "name": "x.png", "digest": D, "stream": 5, ...}  a result is written
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch

from guided_diffusion.config import UserError
from guided_diffusion.machine import storage

STATES = 1  # to be raised when states come to have another form

writing = partial(
    storage.writing,
    advice="what was written before is complete, and the same command goes on from there",
)

Settings = dict[str, Any]  # key -> what determines pixels: a setting, or a checkpoint's digest


@dataclass(frozen=True)
class Origin:
    """What one result follows from, besides the settings of its run."""

    stream: int  # seed of its random numbers
    flip: bool
    image: str  # SHA-256 of the file
    mask: str
    start: str | None = None  # of the picture to start from; None: pure noise

    def content(self) -> dict[str, Any]:
        """As it is recorded: without `start` where there is none, as before that was known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def differences(self, now: Origin) -> str:
        """How another origin of the same result differs, in words; "" if it does not."""
        if self.image != now.image:
            return "the image changed"
        if self.mask != now.mask:
            return "the mask changed"
        if self.start != now.start:
            return "the start picture changed"
        if self.stream != now.stream:
            return "the seed changed, or its place among the images"
        return "random_flip changed" if self.flip != now.flip else ""


@dataclass(frozen=True)
class Result:
    """A line about a written result."""

    run: int
    digest: str  # of the run's settings
    origin: Origin
    bytes: int  # size of the file
    seconds: float
    views: int = 1  # of its picture; "inputs" in the records


@dataclass
class History:
    """What the records of a folder say."""

    run: int = 0  # the latest
    seed: int | None = None  # of the latest run
    settings: dict[str, Settings] = field(default_factory=dict)  # by digest
    results: dict[str, Result] = field(default_factory=dict)  # by name; the latest

    def read(self, line: dict[str, Any]) -> None:
        """Take in a line; lines come in the order in which they count."""
        run = line["run"]
        self.run = max(self.run, run)
        if "settings" in line:
            self.settings[line["digest"]] = line["settings"]
            self.seed = line["seed"]
        elif "redo" in line:
            self.results.pop(line["name"], None)
        else:
            origin = Origin(
                line["stream"], line["flip"], line["image"], line["mask"], line.get("start")
            )
            self.results[line["name"]] = Result(
                run, line["digest"], origin, line["bytes"], line["seconds"], line.get("inputs", 1)
            )

    def differences(self, digest: str, settings: Settings) -> str:
        """How settings differ from those with this digest, in words; "" if they do not."""
        if digest == digest_of(settings):
            return ""
        before = self.settings.get(digest)
        if before is None:
            return "its settings are not known"
        changed = [
            _difference(key, before.get(key), settings.get(key))
            for key in {**before, **settings}
            if before.get(key) != settings.get(key)
        ]
        if not changed:
            return "its settings are recorded in another form"
        return "; ".join(changed[:2]) + (f"; and {len(changed) - 2} more" if changed[2:] else "")


def _difference(key: str, before: Any, now: Any) -> str:
    if key in ("model_path", "classifier_path") and before and now:
        return f"the file of {key} changed"
    before, now = (_shown(value) for value in (before, now))
    return f"{key} was {before}, is {now}"


def _shown(value: Any) -> str:
    if value is None:
        return "at its default"
    return value if isinstance(value, str) else json.dumps(value)


class Records:
    """The folder of records of one folder of results."""

    def __init__(self, results: str, rank: int = 0):
        """results: the folder of the results."""
        self.folder = beside(results, ".run")
        self.path = f"{self.folder}/images-{rank}.jsonl"
        self._lock: BinaryIO | None = None

    def lock(self) -> None:
        """Keep other runs out until this process ends. Raises UserError if there is one."""
        if self._lock is not None:
            return
        advice = "change the folder's permissions, or `paths` in the config"
        with storage.writing(f"in {self.folder}", advice):
            try:
                self._lock = storage.lock(f"{self.folder}/lock")
            except BlockingIOError as error:
                raise UserError(
                    f"another run is writing these results ({error}, {self.folder}/lock): wait "
                    "until it ends, or give this one other `paths`"
                ) from error

    def history(self) -> History:
        """What all ranks of all runs have recorded. Raises UserError."""
        try:
            files = [path for path in self._files() if path.endswith(".jsonl")]
            lines = [line for path in files for line in _read_lines(path)]
        except OSError as error:
            raise UserError(
                f"cannot read the records in {self.folder}: {error.strerror or error}; change the "
                "folder's permissions, or delete it to start afresh"
            ) from error
        history = History()
        # Within a run, what was set aside comes before what was written anew.
        for line in sorted(lines, key=lambda line: (line["run"], "bytes" in line)):
            with suppress(KeyError):  # a line by something else
                history.read(line)
        return history

    def _files(self) -> list[str]:
        return storage.list_files(self.folder) if storage.is_dir(self.folder) else []

    def begin(self, run: int, seed: int, settings: Settings) -> None:
        """Note that a run begins. Raises OSError."""
        digest = digest_of(settings)
        self._append({"run": run, "seed": seed, "settings": settings, "digest": digest})

    def set_aside(self, run: int, reasons: dict[str, str]) -> None:
        """Note which results do not count any more, and why. Raises OSError."""
        if reasons:
            self._append(*({"run": run, "name": n, "redo": why} for n, why in reasons.items()))

    def finished(self, name: str, result: Result) -> None:
        """Note that a result is written. Raises OSError."""
        line = {"run": result.run, "name": name, "digest": result.digest}
        line |= result.origin.content() | {"bytes": result.bytes, "seconds": result.seconds}
        line["inputs"] = result.views
        self._append(line)

    def _append(self, *lines: dict[str, Any]) -> None:
        storage.append_line(self.path, "\n".join(map(json.dumps, lines)))

    def state_path(self, digest: str, origins: Sequence[Origin], view: int = 0) -> str:
        """Where the sampler's state for a batch goes; the name says all that it follows from.

        view: its number in each picture, as the batch is of all first views, or all second ones, …
        """
        later = [view] if view else []  # as before pictures had several
        key = digest_of([STATES, digest, [origin.content() for origin in origins], *later])
        return f"{self.folder}/unfinished/{key}.state"

    def forget_states(self) -> None:
        """Remove all, once nothing is unfinished. Raises OSError."""
        for path in self._files():
            if path.startswith(f"{self.folder}/unfinished/"):
                storage.remove(path)


def beside(folder: str, suffix: str) -> str:
    """The path beside a folder, of its name with a suffix, by whatever path one comes to it."""
    if storage.is_remote(folder):
        return folder.rstrip("/") + suffix
    path, here = os.path.realpath(folder), os.getcwd()
    return (os.path.relpath(path) if path.startswith(os.path.join(here, "")) else path) + suffix


def save_state(path: str, state: dict[str, Any]) -> None:
    """Write tensors and numbers. Raises OSError."""
    content = io.BytesIO()  # torch's own words about a full disk are for programmers
    torch.save(state, content)
    data = content.getvalue()
    storage.write_atomically(path, hashlib.sha256(data).digest() + data)


def load_state(path: str) -> dict[str, Any] | None:
    """What `save_state` wrote; None if there is nothing. Raises OSError, ValueError if damaged."""
    if not storage.exists(path):
        return None
    with storage.open_binary(path) as file:
        digest, data = file.read(hashlib.sha256().digest_size), file.read()
    if hashlib.sha256(data).digest() != digest:  # torch would not notice
        raise ValueError("the file is damaged")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _read_lines(path: str) -> Iterator[dict[str, Any]]:
    with storage.open_binary(path) as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # the writer was killed in the middle, or worse
                continue
            if isinstance(line, dict) and "run" in line and _has_our_types(line):
                yield line


_TYPES = {
    **dict.fromkeys(("run", "seed", "stream", "bytes", "inputs"), int),
    **dict.fromkeys(("name", "redo", "digest", "image", "mask", "start"), str),
    **{"settings": dict, "flip": bool, "seconds": (int, float)},
}


def _has_our_types(line: dict[str, Any]) -> bool:
    return all(isinstance(value, _TYPES.get(key, object)) for key, value in line.items())


def digest_of(content: Any) -> str:
    """A short name for what JSON can hold; what is equal has the same."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
