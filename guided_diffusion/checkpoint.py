"""Checkpoints: loaded safely and strictly; what differs is said in the config's terms."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

import torch
from torch import nn

from guided_diffusion import storage
from guided_diffusion.config import UserError

# What `download.sh` calls the published files.
DOWNLOADS = {
    "celeba256_250000.pt": "celeba",
    "places256_300000.pt": "places",
    "256x256_diffusion.pt": "imagenet",
    "256x256_classifier.pt": "classifier",
}

Network = TypeVar("Network", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]


def load_weights(network: Network, path: str) -> Network:
    """Fill a network built on the meta device with the weights of a checkpoint.

    The file is mapped into memory, and the weights stay there: loading costs neither time nor
    memory beyond the file's own size. Raises UserError, as `load_state_dict` and if any key or
    shape differs.
    """
    state_dict = _matching_state_dict(network, path)
    network.load_state_dict(_in_fp32(state_dict), assign=True)
    return network


def check_weights(network: nn.Module, path: str) -> None:
    """Compare every key and shape of a checkpoint with a network. Raises UserError."""
    _matching_state_dict(network, path)


def load_state_dict(path: str) -> dict[str, Any]:
    """The contents of a `.pt` file, on the CPU; nothing in it is ever executed.

    Raises UserError if the file is missing, damaged, or holds more than plain data and tensors.
    """
    try:
        if not storage.exists(path):
            raise UserError(_missing_message(path))
        if storage.is_remote(path):
            with storage.open_binary(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        # Files of torch before 1.6 are no zip archives, and cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: this is no plain checkpoint: it is damaged, or it holds objects that could "
            "run code when loaded (nothing was run); use a file that holds tensors alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: cannot read this checkpoint: {reason}; if it was downloaded, delete it and "
            "fetch it again"
        ) from error


def _missing_message(path: str) -> str:
    name = PurePath(path).name
    fetch = f"fetch it: bash download.sh {DOWNLOADS[name]}" if name in DOWNLOADS else ""
    return (
        f"{path}: no such checkpoint; {fetch or 'check the path'}. To see the program work "
        "without any download: python test.py --conf_path confs/demo.yml"
    )


def _matching_state_dict(network: nn.Module, path: str) -> dict[str, torch.Tensor]:
    state_dict = load_state_dict(path)
    if not isinstance(state_dict, Mapping) or not all(map(torch.is_tensor, state_dict.values())):
        raise UserError(
            f"{path}: not a plain state dict (a map of names to tensors); if it is a training "
            "checkpoint, save the network's or its moving average's state_dict() alone"
        )
    found = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if found != wanted:
        raise UserError(f"{path}: {_difference_message(wanted, found)}")
    return state_dict


def _in_fp32(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights stored in half precision are computed with in full; others stay where they are."""
    return {key: tensor.float() for key, tensor in state_dict.items()}


def _difference_message(wanted: Shapes, found: Shapes) -> str:
    """What differs, and the config keys that explain it, in one line."""
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    misshaped = [key for key in wanted if key in found and wanted[key] != found[key]]
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights are missing (first {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} are not known (first {unexpected[0]})")
    if misshaped:
        key = misshaped[0]
        parts.append(
            f"{len(misshaped)} have another shape (first {key}: {list(found[key])} in the file, "
            f"{list(wanted[key])} by the config)"
        )
    reasons = list(dict.fromkeys(_explanations(wanted, found)))
    return f"the checkpoint does not fit the config: {', '.join(parts)}; {'; '.join(reasons)}"


def _explanations(wanted: Shapes, found: Shapes) -> Iterator[str]:
    """The config's keys that account for the differences."""
    if "time_embed.0.weight" not in found:
        nested = next((key for key in found if key.endswith("time_embed.0.weight")), None)
        prefix = nested and nested.removesuffix("time_embed.0.weight")
        yield (
            f"its names begin with {prefix!r}: save the state_dict() of the network inside"
            if prefix
            else "it is no network of this family: it has no time_embed"
        )
        return
    if _is_denoiser(wanted) != _is_denoiser(found):
        kind, key = ("denoiser", "model_path") if _is_denoiser(found) else _CLASSIFIER
        yield f"it is a {kind}, which belongs in {key}"
        return
    read_features = _denoiser_features if _is_denoiser(wanted) else _classifier_features
    ours, theirs = read_features(wanted), read_features(found)
    differing = [key for key in ours if ours[key] != theirs[key]]
    for key in differing:
        yield f"{key}: {_said(theirs[key])} in the file, {_said(ours[key])} in the config"
    if not differing:
        yield f"check {', '.join(ours)}"


_CLASSIFIER = ("classifier", "classifier_path")


def _is_denoiser(shapes: Shapes) -> bool:
    return any(key.startswith("output_blocks.") for key in shapes)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return repr(",".join(f"{item:g}" for item in value))
    return "unknown" if value is None else str(value)


def _denoiser_features(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a denoiser tell of the config that it was made with."""
    channels = shapes["time_embed.0.weight"][1]
    upsampler = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")
    levels = 1 + sum(upsampler.fullmatch(key) is not None for key in shapes)
    per_level = _count_blocks(shapes) // levels
    firsts = [f"input_blocks.{level * per_level + 1}" for level in range(levels)]
    widths = [shapes.get(f"{block}.0.out_layers.3.weight", (0,))[0] for block in firsts]
    attended = [level for level, block in enumerate(firsts) if f"{block}.1.qkv.weight" in shapes]
    return {
        "num_channels": channels,
        "channel_mult": [width / channels for width in widths],
        "num_res_blocks": per_level - 1,
        "attention_resolutions (as image_size divided by)": [2**level for level in attended],
        "resblock_updown": _resblock_updown(shapes),
        "use_scale_shift_norm": _use_scale_shift_norm(shapes),
        "learn_sigma": shapes.get("out.2.weight", (3,))[0] == 6,
        "class_cond": "label_emb.weight" in shapes,
    }


def _classifier_features(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a classifier tell of the config that it was made with."""
    attended = [key for key in shapes if re.fullmatch(r"input_blocks\.\d+\.1\.qkv\.weight", key)]
    _, tokens = shapes.get("out.2.positional_embedding", (0, None))
    return {
        "classifier_width": shapes["time_embed.0.weight"][1],
        "classifier_depth (as blocks on the way down)": _count_blocks(shapes),
        "classifier_attention_resolutions (as blocks with attention)": len(attended),
        "classifier_resblock_updown": _resblock_updown(shapes),
        "classifier_use_scale_shift_norm": _use_scale_shift_norm(shapes),
        "classifier_pool": _pool(shapes),
        "image_size (as pixels of the pool)": tokens and tokens - 1,
    }


def _count_blocks(shapes: Shapes) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith("input_blocks.")})


def _resblock_updown(shapes: Shapes) -> bool:
    return not any(key.endswith(".op.weight") for key in shapes)


def _use_scale_shift_norm(shapes: Shapes) -> bool:
    block = "middle_block.0"
    embedding = shapes.get(f"{block}.emb_layers.1.weight", (0,))[0]
    return embedding == 2 * shapes.get(f"{block}.out_layers.3.weight", (0,))[0]


def _pool(shapes: Shapes) -> str:
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if len(shapes.get("out.3.weight", ())) == 4:
        return "adaptive"
    return "spatial_v2" if "out.3.weight" in shapes else "spatial"
