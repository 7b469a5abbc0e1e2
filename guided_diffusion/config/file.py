"""A YAML file and its overrides, read into a table; errors name the line."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from guided_diffusion.config.errors import UserError
from guided_diffusion.config.kinds import ANYTHING, is_null
from guided_diffusion.config.problems import Problems
from guided_diffusion.config.vocabulary import Vocabulary, key_of, kinds_of
from guided_diffusion.networks.params import ShapeError

_Part = TypeVar("_Part")
_Path = tuple[str, ...]  # a dotted path in its parts


class ConfigFile:
    """A YAML file and its overrides as a flat table: key of the vocabulary -> parsed value."""

    def __init__(
        self, source: str, overrides: Sequence[str], vocabularies: Mapping[str, Vocabulary]
    ):
        """vocabularies: by the method that the file names."""
        self.source = source
        self.known = {key: kind for v in vocabularies.values() for key, kind in v.known.items()}
        self.nodes: dict[_Path, yaml.Node] = {}
        self.origins: dict[_Path, str] = {}  # for messages: a line of the file, or an override
        self.record(_read(source), (), source)
        for override in overrides:
            self.record_override(override)
        self.dataset_name = self.find_dataset()
        self.method = self.parse(("method",)) if ("method",) in self.nodes else "pixel"
        vocabulary = vocabularies[self.method]
        self.known = vocabulary.known
        self.elsewhere = {k: v for k, v in vocabulary.elsewhere.items() if k not in self.known}
        self.values = {"name": Path(source).stem} | dict(self.parse_all())

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.values)

    def has_section(self, name: str) -> bool:
        """Whether there is such a section, be it an empty one."""
        return self.has(f"{name}.") or isinstance(self.nodes.get((name,)), yaml.MappingNode)

    def drop_unless_overridden(self, section: str, by: str) -> None:
        """Forget a section of the file itself where an override of the key `by` asks otherwise."""
        if " with --set " not in self.origins.get((by,), ""):
            return
        for key in [key for key in self.values if f"{key}.".startswith(f"{section}.")]:
            if " with --set " not in self.origins[tuple(key.split("."))]:
                del self.values[key]

    def make(self, cls: type[_Part], **parts: Any) -> _Part:
        """`cls` from the values of its keys; `parts` are the fields that no key sets."""
        given = {}
        for name, kind in kinds_of(cls).items():
            key = key_of(cls, name)
            if key in self.values:
                given[name] = self.values[key]
            elif not hasattr(cls, name):  # no default
                self.refuse(key, kind.accepts)
        return cls(**given, **parts)

    def refuse_first(self, *problems: Problems) -> None:
        for key, accepted in chain(*problems):
            self.refuse(key, accepted)

    def refuse_misshapen(self, cls: type, shape: Callable[[], Any]) -> None:
        """Refuse a network that cannot be built, by the key of `cls` that is at fault."""
        try:
            shape()
        except ShapeError as error:
            known = error.field in kinds_of(cls)
            self.refuse(key_of(cls, error.field) if known else error.field, error.accepted)

    def refuse(self, key: str, accepted: str) -> NoReturn:
        """Raise the one-line error about a key, or a section, of the vocabulary."""
        name = self.dataset_name or "NAME"
        path = tuple(name if part == "*" else part for part in key.split("."))
        found = f"found {_shown(self.nodes[path])}" if path in self.nodes else "missing"
        self.refuse_path(path, f"{found}; accepted: {accepted}")

    def refuse_path(self, path: _Path, problem: str) -> NoReturn:
        where = ": ".join(filter(None, [self.origins.get(path, self.source), ".".join(path)]))
        raise UserError(f"{where}: {problem}")

    def record(self, node: yaml.Node, path: _Path, origin: str, override: str = "") -> None:
        """Note the key at `path` and, if it is a section, the keys below it."""
        first = self.origins.get(path)
        self.nodes[path], self.origins[path] = node, origin
        if first:
            self.refuse_path(path, f"the same key as in {first}; accepted: each key once")
        if not _is_section(path, self.known) or not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else _shown(key)
            line = f"{self.source}, line {key.start_mark.line + 1}"
            self.record(value, (*path, name), override or line, override)

    def record_override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        if not (key and equals):
            raise UserError(f"--set {override}: accepted: KEY=VALUE, such as --set seed=5")
        path = tuple(key.split("."))
        for old in [old for old in self.nodes if old[: len(path)] == path]:
            del self.nodes[old], self.origins[old]
        origin = f"{self.source} with --set {override}"
        self.record(self.read_override(text, path, origin), path, origin, override=origin)

    def read_override(self, text: str, path: _Path, origin: str) -> yaml.Node:
        """The value of an override: as it is typed, where YAML would read something else.

        So `[1].jpg`, `my: photo.jpg` and `a #1.jpg` need no quotes. Maps of keys are YAML.
        """
        if _is_section(path, self.known):
            return _compose_section(text, origin)
        typed = yaml.ScalarNode("", text, style="'")  # as if YAML's quotes were around it
        try:
            node = _compose(text, origin)
            if isinstance(node, yaml.ScalarNode):
                return node if _is_all_of(node, text) else typed
            self.known[_pattern(path)].parse(typed)
        except UserError:
            return typed
        except (KeyError, ValueError):  # this key takes no such text: a list of numbers, say
            return node
        return typed

    def find_dataset(self) -> str:
        """The dataset's name; '' if there is none."""
        paths = [path for path in self.nodes if path[:2] == _DATASETS and path[2:]]
        names = list(dict.fromkeys(path[2] for path in paths))
        if len(names) > 1:
            found = f"found {len(names)} datasets ({', '.join(names)})"
            remedy = "make a file for each"
            if any(" with --set " in self.origins[path] for path in paths):
                remedy = f"with --set, write data.eval.{names[0]}, as in the file"
            self.refuse_path(_DATASETS, f"{found}; accepted: exactly one; {remedy}")
        return names[0] if names else ""

    def parse(self, path: _Path) -> Any:
        """The value of the key at `path`."""
        key = _pattern(path)
        try:
            return self.known[key].parse(self.nodes[path])
        except ValueError:
            self.refuse(key, self.known[key].accepts)

    def parse_all(self) -> Iterator[tuple[str, Any]]:
        """Key and value of every setting. Raises UserError for an unknown key or a wrong value."""
        for path, node in self.nodes.items():
            if _pattern(path) in self.known:
                yield _pattern(path), self.parse(path)
            elif not _is_section(path, self.known):
                self.refuse_path(path, self.unknown_problem(path))
            elif not isinstance(node, yaml.MappingNode) and not (path and is_null(node)):
                self.refuse_path(path, f"found {_shown(node)}; accepted: a map of keys")

    def unknown_problem(self, path: _Path) -> str:
        """What to do with a key, or a section, that is not of this vocabulary."""
        what = _for_section(self.elsewhere, _pattern(path))
        if what:
            return what
        own = _with_sections(key for key, kind in self.known.items() if kind is not ANYTHING)
        dataset = self.dataset_name or "NAME"

        def likeness(key: str) -> tuple[float, bool, float]:
            # The last word counts first, so that a misplaced key is shown its place.
            name = key.replace("*", dataset)
            pairs = (path[-1].lower(), name.rpartition(".")[2]), (".".join(path), name)
            last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
            if path[-1] in pairs[0][1].split("_"):  # `steps` is rather diffusion_steps
                last = max(last, 0.75)
            if key not in own and last < 0.9:
                last = 0  # a key of another kind of run has to be meant for sure
            return last, key in own, whole

        nearest = max(sorted(own | _with_sections(self.elsewhere)), key=likeness)
        problem = f"unknown key; the nearest known key is {nearest.replace('*', dataset)}"
        what = None if nearest in own else _for_section(self.elsewhere, nearest)
        return f"{problem} ({what})" if what else problem


_DATASETS = ("data", "eval")


def _pattern(path: _Path) -> str:
    """A found path as the vocabulary writes it: `*` is the dataset's name."""
    parts = [part.replace(".", r"\.") for part in path]  # a dot in a name opens no section
    if path[:2] == _DATASETS and path[2:]:
        parts[2] = "*"
    return ".".join(parts)


def _is_section(path: _Path, known: Mapping) -> bool:
    return not path or any(key.startswith(_pattern(path) + ".") for key in known)


def _with_sections(keys: Iterable[str]) -> set[str]:
    """Keys, and the sections that they are in."""
    return {
        ".".join(parts[: i + 1])
        for parts in (key.split(".") for key in keys)
        for i in range(len(parts))
    }


def _for_section(elsewhere: Mapping[str, str], section: str) -> str | None:
    """What to do with a key, or with a section by its first key; None: it is not elsewhere."""
    found = (what for key, what in elsewhere.items() if f"{key}.".startswith(f"{section}."))
    return next(found, None)


def _read(source: str) -> yaml.Node:
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source}: cannot read this config file: {reason}") from None
    node = _compose(text, source)
    if is_null(node):
        raise UserError(f"{source}: the file is empty; copy one from confs/ and edit it")
    return node


def _compose(text: str, origin: str) -> yaml.Node:
    """The YAML node of `text`, its scalars as they are written; a null where there is nothing."""
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader) or yaml.ScalarNode("", "")
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        hint = "; indent with spaces, not with tabs" if r"'\t'" in str(problem) else ""
        raise UserError(f"{origin}{place}: not valid YAML: {problem}{hint}") from None


def _compose_section(text: str, origin: str) -> yaml.Node:
    """As `_compose`, for an override that sets several keys. Raises UserError for a comment."""
    if " #" in text:
        raise UserError(
            f"{origin}: what follows ' #' is a comment in YAML; set the key with it alone"
        )
    return _compose(text, origin)


def _is_all_of(node: yaml.ScalarNode, text: str) -> bool:
    """Whether nothing of a text is lost in YAML's reading: it is plain, or in quotes as a whole."""
    text = text.strip()
    in_quotes = node.style in ("'", '"') and text[0] == text[-1] == node.style
    return in_quotes or node.value == text


def _shown(node: yaml.Node) -> str:
    """A found value for a message."""
    if not isinstance(node, yaml.ScalarNode):
        return "a map" if isinstance(node, yaml.MappingNode) else "a list"
    text = node.value if len(node.value) <= 80 else f"{node.value[:80]}..."
    return repr(text) if node.style else text or "nothing"
