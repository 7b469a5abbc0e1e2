"""Which names belong together: those of images, and those of masks or start pictures made for them.

A name is (folder, stem), the folder below the one that is searched: "sub/x.png" -> ("sub", "x").
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

Name = tuple[str, str]
Reading = Callable[[Name], Name]  # what counts of a name


@dataclass(frozen=True)
class Affix:
    """What the stem of a mask has more than that of its image."""

    prefix: str = ""
    suffix: str = ""

    def of(self, name: Name) -> Name | None:
        """The name without it; None if it has no such affix, or nothing else."""
        folder, stem = name
        bare = stem.removeprefix(self.prefix).removesuffix(self.suffix)
        has_both = f"{self.prefix}{bare}{self.suffix}" == stem
        return (folder, bare) if bare and has_both else None

    def __str__(self) -> str:
        return "…".join(filter(None, (self.prefix, self.suffix)))

    @property
    def is_number(self) -> bool:
        """Whether it is part of a number: "1" in "12" does not make it a mask of "2"."""
        return str(self).isdecimal()

    @property
    def says_mask(self) -> bool:
        return "mask" in str(self).casefold()

    @property
    def stands_apart(self) -> bool:
        """Whether a sign sets it off, as in "x_hole", so that pictures of one folder have it."""
        return not (self.suffix[:1] or self.prefix[-1:]).isalnum()


@dataclass(frozen=True)
class Match:
    """Which of the others belongs to each image."""

    order: Sequence[int]  # for each image, the place of its partner
    rule: str  # in words


def match_names(images: Sequence[Name], others: Sequence[Name]) -> Match | None:
    """As many others as images, by their names; None where names do not tell.

    Equal names, then names equal but for one affix that all others share. Subfolders count if they
    tell, and then capital letters if they do.
    """
    if match := _match(images, others, Affix()):
        return Match(match, "by name")
    for affix in _affixes_between(images, others):
        if not affix.is_number and (match := _match(images, others, affix)):
            return Match(match, f"by name and {affix}")
    return None


def _match(images: Sequence[Name], others: Sequence[Name], affix: Affix) -> list[int] | None:
    for reading in _READINGS:
        place = {_bare(affix, reading, name): place for place, name in enumerate(others)}
        order = [place.get(reading(name)) for name in images]
        if len({*order} - {None}) == len(images) == len(others):
            return order
    return None


def _composed(name: Name) -> Name:
    """A Mac takes letters apart from their accents."""
    folder, stem = (unicodedata.normalize("NFC", part) for part in name)
    return folder, stem


def _without_folder(name: Name) -> Name:
    return "", _composed(name)[1]


def _folded(name: Name) -> Name:
    folder, stem = (part.casefold() for part in _composed(name))
    return folder, stem


def _folded_without_folder(name: Name) -> Name:
    return "", _folded(name)[1]


_READINGS: tuple[Reading, ...] = (_composed, _without_folder, _folded, _folded_without_folder)


def _bare(affix: Affix, reading: Reading, name: Name) -> Name | None:
    bare = affix.of(_composed(name))
    return bare and reading(bare)


def _affixes_between(images: Sequence[Name], others: Sequence[Name]) -> Iterator[Affix]:
    """What all others have in common, if it makes up for all that they have more than images."""
    of_images, of_others = (
        sum(len(_composed(name)[1]) for name in names) for names in (images, others)
    )
    more = (of_others - of_images) // len(images)
    start, end = _common_ends(others)
    for length in range(max(0, more - len(end)), min(more, len(start)) + 1):
        yield Affix(start[:length], end[len(end) - more + length :])


def _common_ends(names: Sequence[Name]) -> tuple[str, str]:
    """What all stems have in common, at the beginning and at the end."""
    stems = [_composed(name)[1] for name in names]
    start, reversed_end = (
        os.path.commonprefix(stems),
        os.path.commonprefix([s[::-1] for s in stems]),
    )
    return start, reversed_end[::-1]


# ---- Images and masks in one folder ----


def split_names(names: Sequence[Name]) -> tuple[dict[int, int], Affix] | None:
    """Of pictures in one folder, the place of each image -> that of its mask, "x" -> "x_mask".

    None if they are not images and masks. With an affix that says "mask", some may lack a partner.
    """
    places = {_composed(name): place for place, name in enumerate(names)}
    best: tuple[dict[int, int], Affix] | None = None
    for affix in _affixes_within(places):
        masks = {affix.of(name): place for name, place in places.items()}
        found = {places[bare]: place for bare, place in masks.items() if bare in places}
        found = {image: mask for image, mask in found.items() if image not in found.values()}
        is_complete = len(found) * 2 == len(names)
        enough = is_complete and affix.stands_apart or affix.says_mask
        if enough and (best is None or len(found) > len(best[0])):
            best = found, affix
    return best


def _affixes_within(names: dict[Name, int]) -> list[Affix]:
    """What one name has more than another one."""
    affixes = {
        affix: None
        for folder, stem in names
        for cut in range(1, len(stem))
        for affix, rest in (
            (Affix(suffix=stem[cut:]), stem[:cut]),
            (Affix(prefix=stem[:cut]), stem[cut:]),
        )
        if (folder, rest) in names
    }
    return [affix for affix in affixes if not affix.is_number]


# ---- Sorted order ----


def contradictions(images: Sequence[Name], others: Sequence[Name]) -> list[int]:
    """Places at which sorted order gives an image what another image's name is on.

    Also where numbers tell that all others belong to other images, as 1, 10, 2 and 01, 02, 10.
    """
    start, end = _common_ends(others)
    affixes = [Affix()]
    affixes += [Affix(prefix=start[:length]) for length in range(1, len(start) + 1)]
    affixes += [Affix(suffix=end[at:]) for at in range(len(end))]
    found = [_belonging(images, others, affix, read) for affix in affixes for read in _READINGS]
    by_number = [_by_key(images, others, key) for key in (_numbers, _last_number)]
    evidence = (max(found, key=len), _by_beginning(images, others), *by_number)
    wrong = ([place for place, image in each.items() if place != image] for each in evidence)
    return sorted(max(wrong, key=len))


def _belonging(
    images: Sequence[Name], others: Sequence[Name], affix: Affix, reading: Reading
) -> dict[int, int]:
    """Place of another -> that of the image whose name it has, where there is one such image."""
    places: dict[Name, list[int]] = {}
    for place, name in enumerate(images):
        places.setdefault(reading(name), []).append(place)
    bare = {place: _bare(affix, reading, name) for place, name in enumerate(others)}
    return {place: places[b][0] for place, b in bare.items() if len(places.get(b, ())) == 1}


def _by_beginning(images: Sequence[Name], others: Sequence[Name]) -> dict[int, int]:
    """By the image's name at the beginning, as 10_mask007; nothing unless it tells for all."""
    places = {stem: place for place, (_, stem) in enumerate(images)}
    found = {place: _beginning(stem, places) for place, (_, stem) in enumerate(others)}
    tells = len({*found.values()} - {None}) == len(images) == len(others)
    return found if tells else {}


def _beginning(stem: str, places: dict[str, int]) -> int | None:
    cuts = (cut for cut in range(len(stem), 0, -1) if stem[:cut] in places)
    apart = (cut for cut in cuts if not stem[cut - 1 : cut + 1].isalnum() or cut == len(stem))
    return next((places[stem[:cut]] for cut in apart), None)


def _by_key(
    images: Sequence[Name], others: Sequence[Name], key: Callable[[Name], tuple[int, ...]]
) -> dict[int, int]:
    """By a key; nothing unless it tells for all."""
    places = {key(name): place for place, name in enumerate(images)}
    found = {place: places.get(key(name)) for place, name in enumerate(others)}
    tells = len({*found.values()} - {None}) == len(images) == len(others)
    return found if tells else {}


def _numbers(name: Name) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", name[1])))


def _last_number(name: Name) -> tuple[int, ...]:
    return _numbers(name)[-1:]


def differ(image: Name, other: Name) -> bool:
    """Whether their stems do."""
    return _folded_without_folder(image) != _folded_without_folder(other)


def likeness(image: Name, other: Name) -> float:
    """Of two stems, from 0 to 1."""
    return SequenceMatcher(None, image[1], other[1], autojunk=False).ratio()
