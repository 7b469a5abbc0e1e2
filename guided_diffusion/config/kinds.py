"""What the types of keys accept: each is a parser of YAML nodes, and the words for a message."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml

_END = 2**63 - 1  # of the whole numbers that torch and numpy hold


@dataclass(frozen=True)
class Kind:
    """What a key accepts: in words, and as a parser that raises ValueError for anything else."""

    accepts: str
    parse: Callable[[yaml.Node], Any]


def is_null(node: yaml.Node) -> bool:
    """Whether it is YAML's null, which quotes would turn into mere text."""
    plain = isinstance(node, yaml.ScalarNode) and not node.style
    return plain and node.value in ("", "~", "null", "Null", "NULL")


def _text(node: yaml.Node) -> str:
    """The text as it was written: without quotes too, `250`, `007` and `1.10` mean themselves."""
    if not isinstance(node, yaml.ScalarNode) or (is_null(node) and node.value):
        raise ValueError
    return node.value


def _unquoted(node: yaml.Node) -> str:
    """The text of a number or a boolean, which quotes would turn into mere text."""
    text = _text(node)
    if node.style:
        raise ValueError
    return text


def _flag(node: yaml.Node) -> bool:
    word = _unquoted(node).lower()
    if word not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError
    return word in ("true", "yes", "on")


def _kind(accepts: str, read: Callable[[yaml.Node], Any], valid: Callable[[Any], Any]) -> Kind:
    def parse(node: yaml.Node) -> Any:
        value = read(node)
        if not valid(value):
            raise ValueError
        return value

    return Kind(accepts, parse)


def _number(cast: type, accepts: str, valid: Callable[[Any], bool]) -> Kind:
    return _kind(accepts, lambda node: cast(_unquoted(node)), valid)


def whole(low: int, high: int = _END) -> Kind:
    """Whole numbers from low to high."""
    bounds = f">= {low}" if high == _END else f"from {low} to {high}"
    return _number(int, f"a whole number {bounds}", lambda n: low <= n <= high)


def _items(node: yaml.Node) -> list[str]:
    """The members of a list, which may be written as `[4, 2]` or as `'4,2'`."""
    if isinstance(node, yaml.SequenceNode):
        return [_text(item) for item in node.value]
    text = _text(node)
    return text.split(",") if text else []


def _numbers(cast: type, accepts: str, valid: Callable[[Any], bool]) -> Kind:
    def read(node: yaml.Node) -> tuple:
        return tuple(cast(number) for number in _items(node))

    return _kind(accepts, read, lambda numbers: numbers and all(map(valid, numbers)))


def matching(pattern: str, accepts: str) -> Kind:
    """Text that a regular expression describes as a whole; accepts: the same in words."""
    return _kind(accepts, _text, re.compile(pattern, re.DOTALL).fullmatch)


def null_or(kind: Kind) -> Kind:
    """Null, which becomes None, or what another kind accepts."""

    def parse(node: yaml.Node) -> Any:
        return None if is_null(node) else kind.parse(node)

    return Kind(f"null or {kind.accepts}", parse)


def _or_auto(kind: Kind) -> Kind:
    def parse(node: yaml.Node) -> Any:
        return "auto" if _text(node) == "auto" else kind.parse(node)

    return Kind(f"{kind.accepts}, or auto", parse)


def _empty_or(kind: Kind) -> Kind:
    return Kind(f"'' or {kind.accepts}", lambda node: kind.parse(node) if _items(node) else ())


def only_false(why: str) -> Kind:
    """Only false, for what is not supported; why: to be read after "because"."""
    return _kind(f"only false, because {why}; remove the key", _flag, lambda value: not value)


ANYTHING = Kind("anything", lambda node: None)
Flag = Annotated[bool, Kind("true or false", _flag)]
_TEXT = re.compile(r"[^\0\ud800-\udfff]+", re.DOTALL)
Text = Annotated[str, _kind("text", _text, _TEXT.fullmatch)]
_PATH = re.compile(r"(?!(gs|az|https):/[^/])" + _TEXT.pattern, re.DOTALL)  # a URL that lacks a /
FilePath = Annotated[
    str,
    _kind("a path", lambda node: os.path.expanduser(_text(node)), _PATH.fullmatch),
]
Count = Annotated[int, whole(1)]
CountOrZero = Annotated[int, whole(0)]
BatchSize = Annotated[int | Literal["auto"], _or_auto(whole(1))]
Samples = Annotated[int, whole(1, 10**6)]
CountOrDefault = Annotated[
    int, _number(int, "-1 or a whole number >= 1", lambda n: n == -1 or 1 <= n <= _END)
]
Share = Annotated[float, _number(float, "a number >= 0 and < 1", lambda x: 0 <= x < 1)]
Positive = Annotated[float, _number(float, "a number > 0", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, _number(float, "a number >= 0", lambda x: 0 <= x < math.inf)]
Evaluations = Annotated[int, whole(16, 500)]
Attraction = Annotated[float, _number(float, "a number from 0 to 2", lambda x: 0 <= x <= 2)]
Blocks = Annotated[int, whole(1, 100)]
Side = Annotated[int, whole(1, 2**14)]
Label = Annotated[int, _number(int, "a whole number >= 0", lambda n: abs(n) <= _END)]  # or less
Shift = Annotated[int, whole(-(10**6), 10**6)]
# Streams take seed + image + sample * 2**32, which has to stay below the end.
Seed = Annotated[int, _number(int, "a whole number >= 0 and < 2**62", lambda n: 0 <= n < 2**62)]
Sizes = Annotated[
    tuple[int, ...],
    _numbers(int, "whole numbers >= 1 with commas, such as '32,16,8'", lambda n: n >= 1),
]
Multiples = Annotated[
    tuple[float, ...],
    _empty_or(_numbers(float, "numbers > 0, such as '1,2,2,4'", lambda x: 0 < x < 1000)),
]
WholeMultiples = Annotated[
    tuple[int, ...],
    _numbers(int, "whole numbers from 1 to 999, such as '1,2,4'", lambda n: 1 <= n < 1000),
]
DDIMSteps = Annotated[int, whole(1, 1000)]
Channels = Annotated[int, _number(int, "3 (colours) or 1 (grey)", lambda n: n in (1, 3))]
Colours = Annotated[int, _number(int, "3 (red, green and blue)", lambda n: n == 3)]
OnlyFalse = Annotated[bool, only_false("KL autoencoders are not supported")]
OnlyNone = Annotated[
    str, matching("none", "only none, because attention in the autoencoder is not supported")
]
OnlyEmpty = Annotated[
    tuple[()],
    _kind(
        "only [], because attention in the autoencoder is not supported",
        lambda node: tuple(_items(node)),
        lambda items: not items,
    ),
]
Rates = Annotated[
    tuple[float, ...],
    _numbers(float, "numbers >= 0 and < 1, such as '0.99,0.9999'", lambda x: 0 <= x < 1),
]
Scales = Annotated[
    tuple[float, float],
    _kind(
        "two numbers from 1 to 1000, the smaller first, such as '1,4'",
        lambda node: tuple(float(number) for number in _items(node)),
        lambda scales: len(scales) == 2 and 1 <= scales[0] <= scales[1] <= 1000,
    ),
]
Respacing = Annotated[
    str,
    matching(
        r"|(ddim)?[0-9]{1,9}|[0-9]{1,9}( *, *[0-9]{1,9})+",
        "'' (all steps), 'N', 'N1,N2,...' or 'ddimN', such as '250'",
    ),
]
Device = Annotated[str, matching(r"cpu|mps|cuda(:[0-9]{1,3})?", "cpu, cuda, cuda:N or mps")]
