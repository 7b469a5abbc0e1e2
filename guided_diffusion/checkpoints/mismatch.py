"""How the weights of a checkpoint differ from a network's, in the terms of the config."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from guided_diffusion.checkpoints.lightning import shown
from guided_diffusion.networks.params import CHANNEL_MULT_BY_IMAGE_SIZE

Shapes = dict[str, tuple[int, ...]]  # of weights, by name
Features = dict[str, str | None]  # config key -> its value; None: the shapes do not tell
Explain = Callable[[Shapes, Shapes], Iterator[str]]  # wanted, found -> reasons, with what to do

TIME_EMBED = "time_embed.0.weight"  # every U-Net and classifier has it, of width num_channels

_STEM = "input_blocks.0.0.weight"
_CHANNELS = {  # what other networks take
    4: " (pictures with transparency, or latents)",
    6: " (a small picture beside the noisy one, to enlarge it)",
    7: " (latents, and what to keep of them)",
    9: " (latents, and what to keep of them)",
}

_INCOMPLETE = "no key of the config explains it, so the file is incomplete or for another program"


def explain_pixel_network(wanted: Shapes, found: Shapes) -> Iterator[str]:
    """What accounts for the differences of a denoiser or classifier of pixels."""
    if not _size(found, TIME_EMBED, 1):
        yield _without_time_embed(wanted, found)
        return
    if is_denoiser(wanted) != is_denoiser(found):
        yield (
            "it is a denoiser, which belongs in model_path"
            if is_denoiser(found)
            else "it is a classifier, which belongs in classifier_path"
        )
        return
    channels = _size(found, _STEM, 1)
    if channels not in (0, 1, 3):  # 0: the file does not tell
        yield (
            f"its network takes {channels} channels{_CHANNELS.get(channels, '')}, where this "
            "program's take 3 (colours) or 1 (grey)"
        )
        return
    read_features = _denoiser_features if is_denoiser(wanted) else _classifier_features
    ours, theirs = read_features(wanted), read_features(found)
    if ours["num_classes"] and theirs["num_classes"]:
        ours.pop("class_cond", None)
    yield from _config_reasons(ours, theirs)


def explain_latent_unet(wanted: Shapes, found: Shapes) -> Iterator[str]:
    """What accounts for the differences of a denoiser of latents."""
    if any(name.startswith("model_ema.") for name in found):  # without dots, these tell no more
        yield "its moving average (model_ema) is of another network"
        return
    if not _size(found, TIME_EMBED, 1):
        yield _without_time_embed(wanted, found)
        return
    if any(".transformer_blocks." in name for name in found):
        yield "it is guided by texts (transformer_blocks), which this program's network is not"
    yield from _config_reasons(_latent_unet_features(wanted), _latent_unet_features(found))


def explain_autoencoder(wanted: Shapes, found: Shapes) -> Iterator[str]:
    """What accounts for the differences of an autoencoder."""
    if _CODES not in found:
        yield f"its autoencoder has no codebook ({_CODES}), so it is of another kind, such as KL"
    elif any(".attn" in name for name in found):
        yield "its autoencoder has attention, which this program's has not"
    else:
        yield from _config_reasons(_autoencoder_features(wanted), _autoencoder_features(found))


def difference_message(wanted: Shapes, found: Shapes, explain: Explain) -> str:
    """Why a checkpoint does not fit, in the config's terms, and what differs; one line."""
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    misshaped = [key for key in wanted if key in found and wanted[key] != found[key]]
    differences = []
    if missing:
        differences.append(f"{len(missing)} missing, first {missing[0]}")
    if unknown:
        differences.append(f"{len(unknown)} unknown, first {shown(unknown[0])}")
    if misshaped:
        key = misshaped[0]
        differences.append(
            f"{len(misshaped)} of another shape, first {key}, "
            f"{shown(str(list(found[key])))} in the file and {list(wanted[key])} by the config"
        )
    reasons = "; ".join(explain(wanted, found))
    return f"the checkpoint does not fit the config: {reasons} (weights: {'; '.join(differences)})"


def _config_reasons(ours: Features, theirs: Features) -> Iterator[str]:
    """The keys of the config that tell the two networks apart."""
    explained = False
    for key in ours:
        if None not in (ours[key], theirs[key]) and ours[key] != theirs[key]:
            yield f"{key}: {shown(theirs[key])} in the file, {ours[key]} in the config"
            explained = True
    if not explained:
        yield _INCOMPLETE


def _without_time_embed(wanted: Shapes, found: Shapes) -> str:
    """What a file without that weight is, by how many of the others it has."""
    if 2 * sum(name in found for name in wanted) > len(wanted):
        return _INCOMPLETE
    return f"it is no network of this family, which would have {TIME_EMBED}"


def is_denoiser(names: Iterable[str]) -> bool:
    """Whether a network with such names is a denoiser, not a classifier."""
    return any(name.startswith("output_blocks.") for name in names)


# ---- U-Nets ----------------------------------------------------------------------------------


_MOST_LEVELS = 32  # an image of 2**31 pixels a side; a damaged file may seem to have thousands


class _UNet(NamedTuple):
    """What the shapes of a U-Net tell, whatever the config calls it."""

    channels: int
    channel_mult: str
    num_res_blocks: str
    attended: list[int]  # levels


def _read_unet(shapes: Shapes) -> _UNet:
    channels = _size(shapes, TIME_EMBED, 1)
    upsampler = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")
    levels = 1 + sum(upsampler.fullmatch(key) is not None for key in shapes)
    levels = min(levels, _MOST_LEVELS)
    per_level = _count_blocks(shapes) // levels  # residual ones, and the stem or a downsampling one
    firsts = [f"input_blocks.{level * per_level + 1}" for level in range(levels)]
    widths = [_size(shapes, f"{block}.0.out_layers.3.weight") for block in firsts]
    return _UNet(
        channels,
        channel_mult=",".join(f"{width / channels:g}" for width in widths),
        num_res_blocks=str(max(per_level - 1, 0)),
        attended=[i for i, block in enumerate(firsts) if f"{block}.1.norm.weight" in shapes],
    )


def _denoiser_features(shapes: Shapes) -> Features:
    """What the shapes of a denoiser tell of the config that it was made with."""
    unet = _read_unet(shapes)
    return {
        "in_channels": _number(shapes, _STEM, 1),
        "num_channels": str(unet.channels),
        "channel_mult": unet.channel_mult,
        "num_res_blocks": unet.num_res_blocks,
        # The file does not tell what image_size is.
        "attention_resolutions": _sides(unet.attended),
        "resblock_updown": _resblock_updown(shapes),
        "use_scale_shift_norm": _use_scale_shift_norm(shapes),
        "learn_sigma": _yaml(_size(shapes, "out.2.weight") == 2 * _size(shapes, _STEM, 1)),
        "class_cond": _class_cond(shapes),
        "num_classes": _number(shapes, "label_emb.weight"),
    }


def _sides(attended: list[int]) -> str:
    return ",".join(f"image_size/{2**level}" for level in attended) or "none"


def _latent_unet_features(shapes: Shapes) -> Features:
    unet = _read_unet(shapes)
    rates = ",".join(str(2**level) for level in reversed(unet.attended))
    features = {
        "in_channels": _number(shapes, _STEM, 1),
        "out_channels": _number(shapes, "out.2.weight"),
        "model_channels": _number(shapes, TIME_EMBED, 1),
        "channel_mult": unet.channel_mult,
        "num_res_blocks": unet.num_res_blocks,
        "attention_resolutions": rates or "none",
        "resblock_updown": _resblock_updown(shapes),
    }
    return {f"latent.unet.{key}": value for key, value in features.items()}


def _resblock_updown(shapes: Shapes) -> str:
    return _yaml(not any(key.endswith(".op.weight") for key in shapes))


def _use_scale_shift_norm(shapes: Shapes) -> str:
    block = "middle_block.0"
    width = _size(shapes, f"{block}.out_layers.3.weight")
    return _yaml(_size(shapes, f"{block}.emb_layers.1.weight") == 2 * width)


def _class_cond(shapes: Shapes) -> str:
    classes = _size(shapes, "label_emb.weight")
    return f"true ({classes} classes)" if classes else "false"


# ---- Classifiers -----------------------------------------------------------------------------


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
        "classifier_width": str(_size(shapes, TIME_EMBED, 1)),
        "classifier_depth": str(depth) if depth else None,
        "classifier_attention_resolutions": ",".join(sides) or (None if attended else "none"),
        "classifier_resblock_updown": _resblock_updown(shapes),
        "classifier_use_scale_shift_norm": _use_scale_shift_norm(shapes),
        "classifier_pool": _pool(shapes),
        "in_channels": _number(shapes, _STEM, 1),
        "num_classes": _num_classes(shapes),
    }


# A classifier's levels follow from its image_size, so they tell it.
_IMAGE_SIZES = {len(mult): size for size, mult in CHANNEL_MULT_BY_IMAGE_SIZE.items()}


def _pool(shapes: Shapes) -> str:
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if len(shapes.get("out.3.weight", ())) == 4:
        return "adaptive"
    return "spatial_v2" if "out.3.weight" in shapes else "spatial"


def _num_classes(shapes: Shapes) -> str | None:
    """Of a classifier's logits."""
    lasts = ("out.2.c_proj.weight", "out.3.weight", "out.4.weight", "out.2.weight")
    return next((_number(shapes, last) for last in lasts if last in shapes), None)


# ---- Autoencoders ----------------------------------------------------------------------------

_CODES = "quantize.embedding.weight"


def _autoencoder_features(shapes: Shapes) -> Features:
    """What the shapes of an autoencoder tell of the config that it was made with."""
    ch = _size(shapes, "encoder.conv_in.weight")
    block = re.compile(r"encoder\.down\.(\d{1,3})\.block\.(\d{1,3})\.conv1\.weight")
    blocks = {(int(match[1]), int(match[2])) for match in map(block.fullmatch, shapes) if match}
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level, b in sorted(blocks) if b == 0]
    mults = [f"{_size(shapes, first) / ch:g}" for first in firsts] if ch else []
    features = {
        "ch": _number(shapes, "encoder.conv_in.weight"),
        "ch_mult": ",".join(mults) or None,
        "num_res_blocks": str(len({b for _, b in blocks})) if blocks else None,
        "z_channels": _number(shapes, "encoder.conv_out.weight"),
        "embed_dim": _number(shapes, _CODES, 1),
        "n_embed": _number(shapes, _CODES),
    }
    return {f"latent.autoencoder.{key}": value for key, value in features.items()}


# ---- Shapes ----------------------------------------------------------------------------------


def _count_blocks(shapes: Shapes) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith("input_blocks.")})


def _size(shapes: Shapes, key: str, dim: int = 0) -> int:
    """A side of a weight; 0 where there is no such weight or side."""
    shape = shapes.get(key, ())
    return shape[dim] if dim < len(shape) else 0


def _number(shapes: Shapes, key: str, dim: int = 0) -> str | None:
    return str(_size(shapes, key, dim)) if _size(shapes, key, dim) else None


def _yaml(flag: bool) -> str:
    return str(flag).lower()
