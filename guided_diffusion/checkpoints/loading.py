"""Checkpoints: loaded safely and strictly; what differs is said in the config's terms."""

import os
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import PurePath
from typing import Any, BinaryIO

import torch
from torch import nn

from guided_diffusion.checkpoints import lightning
from guided_diffusion.checkpoints.contents import (
    LATENT,
    MAPS,
    TEXT_GUIDED,
    Inside,
    best_of,
    describe,
    kind_of,
    networks_in,
    weights_at,
)
from guided_diffusion.checkpoints.lightning import ForeignError, StoredTensor, shown
from guided_diffusion.checkpoints.mismatch import (
    TIME_EMBED,
    Explain,
    Shapes,
    difference_message,
    explain_autoencoder,
    explain_latent_unet,
    explain_pixel_network,
    is_denoiser,
)
from guided_diffusion.config import UserError
from guided_diffusion.machine import memory, storage
from guided_diffusion.machine.ranks import read_world

DEMO_MODEL = "portraits64.pt"

PIECE = 2**26  # weights of a checkpoint placed at a time: more pieces, less memory, more time

Place = Callable[[str, nn.Module, dict[str, torch.Tensor]], None]
Weights = dict[str, torch.Tensor]
Stored = Mapping[str, StoredTensor | None]  # of a whole latent diffusion checkpoint, by name
ReadParts = Callable[[str, str], Stored]  # of a path, and that of its local copy


@dataclass(frozen=True)
class Part:
    """Which tensors of a latent diffusion checkpoint are a network's."""

    prefix: str  # before the names that the network has for them
    explain: Explain
    average: str | None = None  # where their moving average is: before the names without dots

    def stored_name(self, name: str) -> str:
        """What the tensor to be used is called in a file, by the network's name for it."""
        return self.average + name.replace(".", "") if self.average else self.prefix + name


@dataclass(frozen=True)
class Blank:
    """A network on the meta device, and where its weights are."""

    network: nn.Module
    path: str
    part: Part | None = None  # of a latent diffusion checkpoint; None: the file has them alone


@dataclass(frozen=True)
class Checkpoint:
    """Weights that fit a blank network."""

    blank: Blank
    open_weights: Callable[[], Weights]

    @property
    def network(self) -> nn.Module:
        """Blank, until `load_weights` has filled it."""
        return self.blank.network


LATENT_UNET = Part("model.diffusion_model.", explain_latent_unet, "model_ema.diffusion_model")
LATENT_AUTOENCODER = Part("first_stage_model.", explain_autoencoder)


def place_copies(name: str, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give a module its weights, in the types that it has and in channels_last."""
    for key, weight in weights.items():
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        dtype = getattr(module, key).dtype
        weight = weight.to(dtype, memory_format=layout, copy=True)
        setattr(module, key, nn.Parameter(weight, requires_grad=False))


def check_weights(*blanks: Blank) -> list[Checkpoint]:
    """Compare every key and shape of checkpoints with networks; parts of one file are read once.

    Raises UserError, as `load_state_dict` and if anything differs; warns, once, if a part should
    have a moving average and has none (of the processes of a run, that of rank 0 does).
    """
    read_parts = cache(partial(_load, read=_read_stored, anew=_WHOLE_MODEL))
    return [Checkpoint(blank, _matching_weights(blank, read_parts)) for blank in blanks]


def load_weights(checkpoint: Checkpoint, place: Place = place_copies) -> nn.Module:
    """Fill a blank network with the weights that fit it.

    place: (name of a module, module, its weights in the mapped file); it copies what it keeps of
    them, because the file is mapped and left again piece by piece, so that all weights are in
    memory once. Raises UserError if the file cannot be read any more.
    """
    network = checkpoint.network
    for names in _pieces(network):
        # Anew each time: what was read of a mapping counts as used until it closes.
        weights = checkpoint.open_weights()
        for name in names:
            module = network.get_submodule(name)
            keys = {key: f"{name}.{key}" if name else key for key, _ in _own_weights(module)}
            place(name, module, {key: weights.pop(full) for key, full in keys.items()})
    return network


def local_path(path: str) -> str:
    """The path itself, or that of a copy on this machine of a remote checkpoint.

    The copy is downloaded if there is none, or another version of it; a process does that at most
    once, so that all that it does with a checkpoint is done with the same. Raises UserError, also
    if there is neither a file nor a folder, but a device or a pipe, which might have no end.
    """
    if storage.is_remote(path):
        return _copy(path)
    _refuse_devices(path)
    return path


def _refuse_devices(path: str) -> None:
    with suppress(OSError, ValueError):  # reading says what is wrong
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise UserError(f"{path}: this is a device or a pipe; a checkpoint must be a file")


def fingerprint(path: str) -> dict[str, Any]:
    """Path, size and SHA-256 of a checkpoint. Raises UserError."""
    try:
        size, sha256 = storage.file_digest(local_path(path))
    except OSError as error:
        raise UserError(_unreadable_message(path, error)) from error
    return {"path": path, "bytes": size, "sha256": sha256}


@contextmanager
def enough_memory(path: str) -> Iterator[None]:
    """Raises UserError where the memory does not suffice for what is loaded from this path."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        raise _too_large(path) from error


def _too_large(path: str) -> UserError:
    return UserError(
        f"{path}: there is not enough memory to load this network; close other programs, set "
        "precision: bf16 (half the memory), or raise the limit if one is set (ulimit -v)"
    )


def load_state_dict(path: str) -> dict[str, Any]:
    """The contents of a `.pt` file, on the CPU; nothing in it is ever executed.

    Raises UserError if the file is missing, damaged, or holds more than plain data and tensors,
    unless these are beside a network, whose file then counts without them.
    """
    _refuse_devices(path)
    return _load(path, path)


# ---- Reading ---------------------------------------------------------------------------------

_NETWORK_ALONE = "save the network's state_dict() alone"
_WHOLE_MODEL = "save the whole model's state_dict()"


def _read(path: str) -> Any:
    if storage.is_remote(path):
        with storage.open_binary(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    if _is_safetensors(path):
        from guided_diffusion.checkpoints import safetensors  # which few files need

        return lightning.map_tensors(path, safetensors.read_state_dict(path))
    is_zip = _is_zip(path)
    if is_zip:
        lightning.check_stored(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        if is_zip and (contents := _beside_objects(path)):
            return contents
        raise


def _beside_objects(path: str) -> lightning.Contents | None:
    """The tensors of a file that holds also what would run code; None: it is no known one."""
    contents = lightning.read_contents(path, depth=MAPS)
    if networks_in(contents) or kind_of(contents):
        return lightning.map_tensors(path, contents)
    return None


def _read_stored(path: str) -> Stored:
    """Where the tensors of a latent diffusion checkpoint are in its file."""
    if not _is_safetensors(path):
        return lightning.read_state_dict(path)
    from guided_diffusion.checkpoints import safetensors

    floats = lightning.DTYPES.values()
    stored = safetensors.read_state_dict(path).items()
    return {name: each if each and each.dtype in floats else None for name, each in stored}


def _is_safetensors(path: str) -> bool:
    with open(path, "rb") as file:
        return lightning.begins_like_safetensors(file)


def _is_mapped(path: str) -> bool:
    """Whether reading a file anew takes no memory, nor time."""
    return _is_zip(path) or _is_safetensors(path)


def _load(
    name: str, path: str, read: Callable[[str], Any] = _read, anew: str = _NETWORK_ALONE
) -> Any:
    """The contents of a file that the user knows by this name. Raises UserError.

    anew: how to make a file that is read.
    """
    try:
        return read(path)
    except OSError as error:
        raise UserError(_unreadable_message(name, error)) from error
    except Exception as error:  # torch reports damaged files by many unrelated types
        if memory.ran_out(error):
            raise _too_large(name) from error
        raise UserError(f"{name}: {_damage_message(name, path, error, anew)}") from error


@cache
def _copy(path: str) -> str:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    try:
        return storage.local_copy(path, os.path.join(folder, "repaint", "checkpoints"))
    except OSError as error:
        raise UserError(_unreadable_message(path, error)) from error


def _is_zip(file: str | BinaryIO) -> bool:
    """Files of torch before 1.6 are no zip archives, and cannot be mapped into memory."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # a damaged one that says it spans several disks
        return False


def _unreadable_message(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return _missing_message(path)
    problem = _folder_problem(path) if os.path.isdir(path) else _first_line(error)
    return f"{path}: cannot read this checkpoint: {problem}"


def _folder_problem(path: str) -> str:
    names = sorted(os.listdir(path))
    if {"model_index.json", "config.json", "unet"} & {*names}:
        return (
            "this is a folder of another library, such as diffusers, whose networks have other "
            "layers: take a checkpoint of the guided-diffusion family"
        )
    files = [name for name in names if name.endswith((".pt", ".pth", ".ckpt", ".safetensors"))]
    return f"this is a folder; name a file{f', such as {shown(files[0])}' if files else ''}"


def _missing_message(path: str) -> str:
    if storage.is_remote(path):
        return f"{path}: no such checkpoint; check the path"
    if PurePath(path).name == DEMO_MODEL:
        return f"{path}: no such checkpoint; start it in the repository's folder, which has it"
    return (
        f"{path}: no such checkpoint; {_fetch_command(path) or 'check the path'}. To see the "
        "program work without any download: python test.py --conf_path confs/demo.yml"
    )


def _fetch_command(path: str) -> str:
    from guided_diffusion.downloads.table import CHECKPOINTS  # which no run needs that goes well

    name = PurePath(path).name
    if storage.is_remote(path) or name not in CHECKPOINTS:
        return ""
    return f"fetch it: bash download.sh {CHECKPOINTS[name]}"


def _damage_message(name: str, path: str, error: Exception, anew: str) -> str:
    """What is wrong with a file that could not be read, and what to do."""
    problem, remedy = _file_problem(path), f"fetch it again if you downloaded it, or {anew}"
    if not problem and isinstance(error, ForeignError):
        problem, remedy = str(error), error.remedy
    if fetch := _fetch_command(name):
        remedy = f"delete it and {fetch}"
    return f"{problem or _content_problem(error)}; {remedy}"


def _file_problem(path: str) -> str | None:
    """What its first bytes and its end tell; None: it is as torch or safetensors write files."""
    with storage.open_binary(path) as file:
        start = file.read(4)
        ends_early = start == _ZIP and not _is_zip(file)
        file.seek(0)
        is_safetensors = lightning.begins_like_safetensors(file)
    if not start:
        return "the file is empty"
    if ends_early:
        return "the file is incomplete, its end is missing"
    if start != _ZIP and not start.startswith(_PICKLE) and not is_safetensors:
        return "this is no checkpoint, but a file of another kind, such as text or a web page"
    return None


_ZIP, _PICKLE = b"PK\3\4", b"\x80"  # how files begin that torch.save writes, and wrote until 1.6


def _content_problem(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return (
            "the file is damaged, or it holds objects that could run code when loaded (nothing "
            "was run)"
        )
    return f"the file is damaged: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return shown(text.splitlines()[0], longest=300) if text else type(error).__name__


# ---- Comparing -------------------------------------------------------------------------------


def _matching_weights(blank: Blank, read_parts: ReadParts) -> Callable[[], Weights]:
    """What opens the weights of a checkpoint, all of whose keys and shapes are the network's."""
    path, wanted = blank.path, _shapes(blank.network.state_dict())
    local = local_path(path)
    if blank.part:
        return _matching_part(wanted, path, local, blank.part, read_parts(path, local))
    return _matching_file(wanted, path, local)


def _matching_file(wanted: Shapes, path: str, local: str) -> Callable[[], Weights]:
    contents = _load(path, local)
    place = _find(path, contents, wanted)
    weights = weights_at(contents, place)
    if strange := [name for name, weight in weights.items() if not _is_plain(weight)]:
        raise UserError(f"{path}: {shown(strange[0])} in it is no tensor of floating-point numbers")
    if taken := describe(contents, place):
        _tell(f"{path}: {taken}")
    _compare(path, wanted, _shapes(weights), explain_pixel_network)
    if not _is_mapped(local):
        return lambda: dict(weights)  # because whoever loads them takes them out
    return lambda: weights_at(_load(path, local), place)


def _find(path: str, contents: Any, wanted: Shapes) -> Inside:
    """Where in a file the network is: the only one of its kind, or the only average of it.

    Raises UserError if there is none, or several.
    """
    places, kind = networks_in(contents), kind_of(contents)
    if kind in (TEXT_GUIDED, LATENT) or (kind and not places):
        raise UserError(f"{path}: {kind}")
    if not places and not _is_state_dict(contents):
        raise UserError(f"{path}: {_no_state_dict_message(contents)}")
    alike = [p for p in places if is_denoiser(weights_at(contents, p)) == is_denoiser(wanted)]
    best = best_of(alike or places or [Inside()])
    if len(best) > 1:
        inside = ", ".join(map(str, best[:3]))
        raise UserError(
            f"{path}: there are {len(best)} networks in it, {inside}: save the state_dict() of one "
            "alone"
        )
    return best[0]


def _is_plain(weight: Any) -> bool:
    return (
        isinstance(weight, torch.Tensor)
        and weight.layout == torch.strided
        and weight.dtype in lightning.DTYPES.values()
    )


def _matching_part(
    wanted: Shapes, path: str, local: str, part: Part, stored: Stored
) -> Callable[[], Weights]:
    names = _names_in_file(part, stored, wanted)
    if problem := _part_problem(part, stored, names):
        raise UserError(f"{path}: {problem}")
    tensors = {name: stored[in_file] for name, in_file in names.items()}
    _compare(path, wanted, _shapes(tensors), part.explain)
    if part.average and not _averages(part, stored):
        _tell(
            f"{path}: the file has no moving average (model_ema) of the weights; going on with the "
            "plain ones, whose pictures are worse"
        )
    return partial(_load, path, local, partial(lightning.map_tensors, tensors=tensors))


def _names_in_file(part: Part, stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The names of a part's tensors in a file, by the network's names for them."""
    own = [name for name in stored if name.startswith(part.prefix)]
    plain = {name.removeprefix(part.prefix): name for name in own}
    averages = _averages(part, stored)
    if not averages:
        return plain
    # Where dots were is told by the network's names and, if it is another, by the plain ones.
    dotted = {part.stored_name(name): name for name in (*plain, *wanted)}
    return {dotted.get(name, name): name for name in averages}


def _averages(part: Part, stored: Iterable[str]) -> list[str]:
    return [name for name in stored if part.average and name.startswith(part.average)]


def _part_problem(part: Part, stored: Stored, names: Mapping[str, str]) -> str | None:
    """Why a file has not the part, in which all is to be a tensor; None: it has."""
    if TIME_EMBED in stored:
        return "this is a pixel-space model: set method: pixel, or take a latent diffusion one"
    if not names:
        first = f"; the first is '{shown(next(iter(stored)))}'" if stored else ""
        return f"no whole latent diffusion model: no name in it begins with {part.prefix!r}{first}"
    strange = [name for name in names.values() if stored[name] is None]
    if strange:
        return f"{shown(strange[0])} in it is no tensor of floating-point numbers"
    return None


@cache
def _tell(text: str) -> None:
    """Warn, once a run."""
    if not read_world().rank:
        warnings.warn(text, UserWarning, stacklevel=2)


def _compare(path: str, wanted: Shapes, found: Shapes, explain: Explain) -> None:
    if wanted != found:
        raise UserError(f"{path}: {difference_message(wanted, found, explain)}")


def _shapes(weights: Mapping[str, torch.Tensor | StoredTensor]) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _own_weights(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.named_parameters(recurse=False))


def _pieces(network: nn.Module) -> list[list[str]]:
    """The names of the modules with weights, in pieces of about PIECE."""
    pieces, size = [[]], 0
    for name, module in network.named_modules():
        weights = _own_weights(module)
        if size > PIECE:
            pieces, size = [*pieces, []], 0
        if weights:
            pieces[-1].append(name)
            size += sum(weight.numel() for _, weight in weights)
    return pieces


def _is_state_dict(contents: Any) -> bool:
    return isinstance(contents, Mapping) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in contents.items()
    )


def _no_state_dict_message(contents: Any) -> str:
    parts = contents.items() if isinstance(contents, Mapping) else ()
    inside = [
        key for key, value in parts if isinstance(key, str) and _is_state_dict(value) and value
    ]
    if not inside:
        return f"not a plain state dict, which is a map of names to tensors; {_NETWORK_ALONE}"
    return (
        f"there is no network of this family in it, which would have {TIME_EMBED}; there are other "
        f"weights, under '{shown(inside[0])}'"
    )
