"""Checkpoints: loaded safely and strictly; what differs is said in the config's terms."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import PurePath
from typing import Any, BinaryIO, TypeVar

import torch
from torch import nn

from guided_diffusion import storage
from guided_diffusion.config import CHANNEL_MULT_BY_IMAGE_SIZE, UserError

# What `download.sh` calls the published files.
DOWNLOADS = {
    "celeba256_250000.pt": "celeba",
    "places256_300000.pt": "places",
    "256x256_diffusion.pt": "imagenet",
    "256x256_classifier.pt": "classifier",
}

DEMO_MODEL = "portraits64.pt"

PIECE = 2**26  # weights of a checkpoint placed at a time: more pieces, less memory, more time

Network = TypeVar("Network", bound=nn.Module)
Place = Callable[[str, nn.Module, dict[str, torch.Tensor]], None]
Shapes = dict[str, tuple[int, ...]]
Features = dict[str, str | None]  # config key -> its value; None: the shapes do not tell


def place_copies(name: str, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give a module its weights, in the types that it has and in channels_last."""
    for key, weight in weights.items():
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        dtype = getattr(module, key).dtype
        weight = weight.to(dtype, memory_format=layout, copy=True)
        setattr(module, key, nn.Parameter(weight, requires_grad=False))


def load_weights(network: Network, path: str, place: Place = place_copies) -> Network:
    """Fill a network built on the meta device with the weights of a checkpoint.

    place: (name of a module, module, its weights in the mapped file); what it keeps of them it
    copies, for the file is mapped and left again piece by piece, so that all weights are in memory
    once. Raises UserError, as `load_state_dict` and if any key or shape differs.
    """
    state_dict = _matching_state_dict(network, path)
    for names in _pieces(network):
        for name in names:
            module = network.get_submodule(name)
            keys = {key: f"{name}.{key}" if name else key for key, _ in _own_weights(module)}
            place(name, module, {key: state_dict.pop(full) for key, full in keys.items()})
        if _is_zip(local_path(path)):  # what was read of a mapping counts as used until it closes
            state_dict = _load(path, local_path(path))
    return network


def local_path(path: str) -> str:
    """The path itself, or that of a copy on this machine of a remote checkpoint.

    The copy is downloaded if there is none, or another version of it; a process does that at most
    once, so that all that it does with a checkpoint is done with the same. Raises UserError.
    """
    return _copy(path) if storage.is_remote(path) else path


def fingerprint(path: str) -> dict[str, Any]:
    """Path, size and SHA-256 of a checkpoint. Raises UserError."""
    try:
        size, sha256 = storage.file_digest(local_path(path))
    except OSError as error:
        raise UserError(_unreadable_message(path, error)) from error
    return {"path": path, "bytes": size, "sha256": sha256}


def check_weights(network: nn.Module, path: str) -> None:
    """Compare every key and shape of a checkpoint with a network. Raises UserError."""
    _matching_state_dict(network, path)


def load_state_dict(path: str) -> dict[str, Any]:
    """The contents of a `.pt` file, on the CPU; nothing in it is ever executed.

    Raises UserError if the file is missing, damaged, or holds more than plain data and tensors.
    """
    return _load(path, path)


# ---- Reading ---------------------------------------------------------------------------------


def _load(name: str, path: str) -> Any:
    """The contents of a file that the user knows by this name. Raises UserError."""
    try:
        return _read(path)
    except OSError as error:
        raise UserError(_unreadable_message(name, error)) from error
    except Exception as error:  # torch reports damaged files by many unrelated types
        raise UserError(f"{name}: {_diagnosis(path, error)}; {_remedy(name)}") from error


def _read(path: str) -> Any:
    if storage.is_remote(path):
        with storage.open_binary(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))


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
    return f"{path}: cannot read this checkpoint: {_first_line(error)}"


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
    name = PurePath(path).name
    if storage.is_remote(path) or name not in DOWNLOADS:
        return ""
    return f"fetch it: bash download.sh {DOWNLOADS[name]}"


def _diagnosis(path: str, error: Exception) -> str:
    """What is wrong with a file that torch could not load."""
    with storage.open_binary(path) as file:
        start = file.read(4)
        ends_early = start == _ZIP and not _is_zip(file)
    if not start:
        return "the file is empty"
    if ends_early:
        return "the file is incomplete, its end is missing"
    if start != _ZIP and not start.startswith(_PICKLE):
        return "this is no checkpoint, but a file of another kind, such as text or a web page"
    if isinstance(error, pickle.UnpicklingError):
        return (
            "the file is damaged, or it holds objects that could run code when loaded (nothing "
            "was run)"
        )
    return f"the file is damaged: {_first_line(error)}"


_ZIP, _PICKLE = b"PK\3\4", b"\x80"  # how files begin that torch.save writes, and wrote until 1.6


def _remedy(path: str) -> str:
    if fetch := _fetch_command(path):
        return f"delete it and {fetch}"
    return "fetch it again if you downloaded it, or save the network's state_dict() alone"


def _first_line(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


# ---- Comparing -------------------------------------------------------------------------------


def _matching_state_dict(network: nn.Module, path: str) -> dict[str, torch.Tensor]:
    state_dict = _load(path, local_path(path))
    if not _is_state_dict(state_dict):
        raise UserError(f"{path}: {_no_state_dict_message(state_dict)}")
    found = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if found != wanted:
        raise UserError(f"{path}: {_difference_message(wanted, found)}")
    return state_dict


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
    inside = [key for key, value in parts if _is_state_dict(value) and value]
    remedy = (
        f"there is one inside, under {inside[0]!r}: save that alone"
        if inside
        else "save the network's state_dict() alone"
    )
    return f"not a plain state dict, which is a map of names to tensors; {remedy}"


def _difference_message(wanted: Shapes, found: Shapes) -> str:
    """Why a checkpoint does not fit, in the config's terms, and what differs; one line."""
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    misshaped = [key for key in wanted if key in found and wanted[key] != found[key]]
    differences = []
    if missing:
        differences.append(f"{len(missing)} missing, first {missing[0]}")
    if unknown:
        differences.append(f"{len(unknown)} unknown, first {unknown[0]}")
    if misshaped:
        key = misshaped[0]
        differences.append(
            f"{len(misshaped)} of another shape, first {key}, {list(found[key])} in the file and "
            f"{list(wanted[key])} by the config"
        )
    reasons = "; ".join(_explanations(wanted, found))
    return f"the checkpoint does not fit the config: {reasons} (weights: {'; '.join(differences)})"


def _explanations(wanted: Shapes, found: Shapes) -> Iterator[str]:
    """What accounts for the differences, and what to do about it."""
    if not _size(found, _TIME_EMBED, 1):
        prefix = _prefix(found)
        yield (
            f"its names begin with {prefix!r}: save the state_dict() of the network inside"
            if prefix
            else f"it is no network of this family, which would have {_TIME_EMBED}"
        )
        return
    if _is_denoiser(wanted) != _is_denoiser(found):
        yield (
            "it is a denoiser, which belongs in model_path"
            if _is_denoiser(found)
            else "it is a classifier, which belongs in classifier_path"
        )
        return
    read_features = _denoiser_features if _is_denoiser(wanted) else _classifier_features
    ours, theirs = read_features(wanted), read_features(found)
    explained = False
    for key in ours:
        if None not in (ours[key], theirs[key]) and ours[key] != theirs[key]:
            yield f"{key}: {theirs[key]} in the file, {ours[key]} in the config"
            explained = True
    if not explained:
        yield "no key of the config explains it, so the file is incomplete or for another program"


_TIME_EMBED = "time_embed.0.weight"  # every network of this family has it, of width num_channels


def _prefix(shapes: Shapes) -> str:
    """What a wrapper, such as DataParallel, put before every name."""
    nested = next((key for key in shapes if key.endswith(f".{_TIME_EMBED}")), "")
    return nested.removesuffix(_TIME_EMBED)


def _is_denoiser(shapes: Shapes) -> bool:
    return any(key.startswith("output_blocks.") for key in shapes)


def _denoiser_features(shapes: Shapes) -> Features:
    """What the shapes of a denoiser tell of the config that it was made with."""
    channels = _size(shapes, _TIME_EMBED, 1)
    upsampler = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")
    levels = 1 + sum(upsampler.fullmatch(key) is not None for key in shapes)
    per_level = _count_blocks(shapes) // levels  # residual ones, and the stem or a downsampling one
    firsts = [f"input_blocks.{level * per_level + 1}" for level in range(levels)]
    widths = [_size(shapes, f"{block}.0.out_layers.3.weight") for block in firsts]
    attended = [level for level, block in enumerate(firsts) if f"{block}.1.qkv.weight" in shapes]
    return {
        "num_channels": str(channels),
        "channel_mult": ",".join(f"{width / channels:g}" for width in widths),
        "num_res_blocks": str(max(per_level - 1, 0)),
        # The file does not tell what image_size is.
        "attention_resolutions": ",".join(f"image_size/{2**level}" for level in attended) or "none",
        "resblock_updown": _resblock_updown(shapes),
        "use_scale_shift_norm": _use_scale_shift_norm(shapes),
        "learn_sigma": _yaml(_size(shapes, "out.2.weight") == 6),
        "class_cond": _class_cond(shapes),
    }


def _classifier_features(shapes: Shapes) -> Features:
    """What the shapes of a classifier tell of the config that it was made with."""
    attention = re.compile(r"input_blocks\.([0-9]{1,3})\.1\.qkv\.weight")
    attended = sorted(int(match[1]) for match in map(attention.fullmatch, shapes) if match)
    # All residual blocks of a level attend, or none; the downsampling one after them never does.
    depth = next((i for i, block in enumerate(attended) if block != attended[0] + i), len(attended))
    image_size = _IMAGE_SIZES.get(_count_blocks(shapes) // (depth + 1)) if depth else None
    levels = sorted({(block - 1) // (depth + 1) for block in attended})
    sides = [str(image_size // 2**level) for level in levels] if image_size else []
    return {
        "image_size": str(image_size) if image_size else None,
        "classifier_width": str(_size(shapes, _TIME_EMBED, 1)),
        "classifier_depth": str(depth) if depth else None,
        "classifier_attention_resolutions": ",".join(sides) or (None if attended else "none"),
        "classifier_resblock_updown": _resblock_updown(shapes),
        "classifier_use_scale_shift_norm": _use_scale_shift_norm(shapes),
        "classifier_pool": _pool(shapes),
    }


# A classifier's levels follow from its image_size, so they tell it.
_IMAGE_SIZES = {len(mult): size for size, mult in CHANNEL_MULT_BY_IMAGE_SIZE.items()}


def _count_blocks(shapes: Shapes) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith("input_blocks.")})


def _size(shapes: Shapes, key: str, dim: int = 0) -> int:
    """A side of a weight; 0 where there is no such weight or side."""
    shape = shapes.get(key, ())
    return shape[dim] if dim < len(shape) else 0


def _yaml(flag: bool) -> str:
    return str(flag).lower()


def _resblock_updown(shapes: Shapes) -> str:
    return _yaml(not any(key.endswith(".op.weight") for key in shapes))


def _use_scale_shift_norm(shapes: Shapes) -> str:
    block = "middle_block.0"
    width = _size(shapes, f"{block}.out_layers.3.weight")
    return _yaml(_size(shapes, f"{block}.emb_layers.1.weight") == 2 * width)


def _class_cond(shapes: Shapes) -> str:
    classes = _size(shapes, "label_emb.weight")
    return f"true ({classes} classes)" if classes else "false"


def _pool(shapes: Shapes) -> str:
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if len(shapes.get("out.3.weight", ())) == 4:
        return "adaptive"
    return "spatial_v2" if "out.3.weight" in shapes else "spatial"
