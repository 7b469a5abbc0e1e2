"""What a file of weights holds: the network in it, however it is wrapped, or what else it is."""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from guided_diffusion.checkpoints.lightning import MOST_MAPS, StoredTensor, shown
from guided_diffusion.checkpoints.mismatch import TIME_EMBED

MAPS = 4  # in one another that are looked at
SHOWN = 3  # names of what is left out


@dataclass(frozen=True)
class Inside:
    """Where a network is in a file."""

    keys: tuple[str, ...] = ()  # of the maps that it lies in
    prefix: str = ""  # before all its names

    @property
    def is_average(self) -> bool:
        """Whether it is called a moving average of the weights."""
        words = re.split(r"[._\s-]", ".".join((*self.keys, self.prefix)).lower())
        return any(word.startswith("ema") for word in words)

    def __str__(self) -> str:
        under = f"under '{shown('.'.join(self.keys))}'" if self.keys else ""
        without = f"without '{shown(self.prefix)}' before the names" if self.prefix else ""
        return ", ".join(filter(None, [under, without]))


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor, or says where one is."""
    return isinstance(value, (torch.Tensor, StoredTensor))


def networks_in(contents: Any) -> list[Inside]:
    """Where networks of this family are in a map, and in the maps inside it."""
    return [
        Inside(keys, name.removesuffix(TIME_EMBED))
        for keys, values in _maps(contents)
        for name, value in values.items()
        if is_tensor(value) and (name == TIME_EMBED or name.endswith(f".{TIME_EMBED}"))
    ]


def weights_at(contents: Any, place: Inside) -> dict[str, Any]:
    """The weights of a network in a file, by the network's names for them."""
    values = _at(contents, place)
    others = [
        other.prefix for other in networks_in(values) if len(other.prefix) > len(place.prefix)
    ]
    return {
        name.removeprefix(place.prefix): value
        for name, value in values.items()
        if is_tensor(value) and isinstance(name, str) and name.startswith(place.prefix)
        if not any(name.startswith(other) for other in others)
    }


def describe(contents: Any, place: Inside) -> str | None:
    """What is taken of a file, and what is left out; None: it is all taken."""
    beside, values = [], contents
    for key in place.keys:
        beside += [name for name in values if name != key]
        values = values[key]
    taken = {place.prefix + name for name in weights_at(contents, place)}
    beside += [name for name in values if name not in taken]
    names = [f"'{shown(str(name))}'" for name in beside]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    left = f"; left out: {', '.join(names[:SHOWN])}{more}" if names else ""
    return f"took the weights {place}".rstrip() + left if left or place != Inside() else None


def best_of(places: Iterable[Inside]) -> list[Inside]:
    """The moving averages among networks, if there are any, else all of them."""
    places = list(places)
    return [place for place in places if place.is_average] or places


def _at(contents: Any, place: Inside) -> Mapping[Any, Any]:
    for key in place.keys:
        contents = contents[key]
    return contents if isinstance(contents, Mapping) else {}


def _maps(contents: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The maps of names in a tree, with the keys that lead to them, from the outermost.

    Only so many, because maps in a file may contain each other.
    """
    ahead = deque([((), contents)])
    for _ in range(MOST_MAPS):
        if not ahead:
            return
        keys, values = ahead.popleft()
        if isinstance(values, Mapping):
            named = {key: value for key, value in values.items() if isinstance(key, str)}
            yield keys, named
            if len(keys) + 1 < MAPS:
                inner = [item for item in named.items() if isinstance(item[1], Mapping)]
                ahead.extend(((*keys, key), value) for key, value in inner)


# ---- Files of something else -------------------------------------------------------------------


def kind_of(contents: Any) -> str | None:
    """What a file without a network of this family is, and what to do; None: that is not known."""
    if isinstance(contents, Mapping) and {"state", "param_groups"} <= contents.keys():
        return (
            "this is the state of an optimizer, which training goes on with, not a network: take "
            "the file of weights that was saved with it, such as ema_RATE_NNNNNN.pt or "
            "modelNNNNNN.pt"
        )
    maps = [values for _, values in _maps(contents)]
    names = [name for values in maps for name, value in values.items() if is_tensor(value)]
    for pattern, kind in _KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    if names and all(name in ("weight", "bias") for name in names):
        return "this is a single layer, not a network: save the whole network's state_dict()"
    return None


TEXT_GUIDED = (
    "this is a network that is guided by texts, such as Stable Diffusion, which this program "
    "cannot use: take a checkpoint of the guided-diffusion family"
)
LATENT = "this is a latent diffusion checkpoint: set method: latent, or take another file"
_OTHER_LAYERS = "whose layers this program does not have: take a checkpoint in the original format"
_KINDS = {  # what the names of tensors tell
    r"(^|[._])lora(_|\.|$)": (
        "this is a LoRA, which only changes another network a little, not a network: take a whole "
        "one of the guided-diffusion family"
    ),
    r"(^|\.)transformer_blocks\.|^cond_stage_model\.(transformer|model)\.": TEXT_GUIDED,
    r"^conditioner\.|^double_blocks\.": TEXT_GUIDED,
    r"^first_stage_model\.|^model_ema\.diffusion_model": LATENT,
    r"(^|\.)(down_blocks|up_blocks)\.\d+\.": (
        "this is a network of diffusers, which names its layers otherwise (down_blocks): take the "
        "checkpoint in its original format, whose names are such as input_blocks.0.0.weight"
    ),
    r"(^|\.)x_embedder\.": f"this is a diffusion transformer (DiT), {_OTHER_LAYERS}",
    r"^(model\.)?(map_noise|enc\.\d+x\d+_)": f"this is a network of EDM, {_OTHER_LAYERS}",
    r"^(encoder|decoder)\.(conv_in|mid|down|up)\b": (
        "this is an autoencoder alone, not a denoiser: take the file that has the denoiser too"
    ),
}
