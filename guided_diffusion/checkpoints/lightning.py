"""Files of PyTorch Lightning: where their tensors are; nothing in such a file is ever executed.

A file is an archive of torch's (zip): a pickle, and the bytes of each tensor in a record of its
own. Beside the tensors, the pickle holds objects of any package that the training used, and to
unpickle it is to call whatever it names. So it is not unpickled: its instructions are followed
only in writing, where a call leaves an `Unmade` that says what would have been called.

A `pickle.Unpickler` whose `find_class` returns stubs would call nothing either, but would not be
as safe: it computes the hash of each key of a map. If the key is a tuple of tuples, a file of 200
bytes keeps it busy for ever, and one of 2 MB overflows the stack, which ends Python.
"""

import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch


class ForeignError(Exception):
    """A file is whole, but not of a kind that is read here; the message is a clause about it.

    remedy: another, on what to do.
    """

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.remedy = remedy


def shown(text: str, longest: int = 80) -> str:
    """A text out of a file as a message may show it: short, and no command to a terminal."""
    begin = text[: longest + 1]  # escaping makes nothing shorter
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in begin)
    return escaped if len(escaped) <= longest else f"{escaped[: longest - 3]}..."


@dataclass(frozen=True)
class StoredTensor:
    """Where a file holds a tensor, and how."""

    start: int  # of its first element, in bytes from the beginning of the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements

    @property
    def nbytes(self) -> int:
        """From its first element to its last, both included."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.stride, strict=True)
        return self.dtype.itemsize * (1 + sum((side - 1) * step for side, step in steps))


Contents = dict[str, Any]  # by name: StoredTensor, Contents or None
LONGEST_HEADER = 10**8  # bytes, of files of safetensors
MOST_MAPS = 1000  # in one another, in a file, that are looked at


def read_state_dict(path: str) -> dict[str, StoredTensor | None]:
    """What a file holds under `state_dict`, or as a whole if it has no such entry, by name.

    None: something else than a tensor of floating-point numbers. Raises as `read_contents`.
    """
    contents = read_contents(path)
    tensors = contents.get("state_dict", contents)
    items = tensors.items() if isinstance(tensors, dict) else ()
    return {name: each if isinstance(each, StoredTensor) else None for name, each in items}


def read_contents(path: str, depth: int = 2) -> Contents:
    """What a file holds by name: tensors of floating-point numbers, maps of such, None for others.

    depth: of the maps in one another, below which all is None. Raises OSError, ForeignError, and
    errors of many types if the file is damaged.
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ForeignError(
                "this is a file of torch before 1.6", "save it anew with a later one"
            )
        with zipfile.ZipFile(file) as archive:
            pickled = _pickle(archive)
            _check_stored(archive)
            folder = pickled.removesuffix(PICKLE)
            _check_byte_order(archive, f"{folder}byteorder", file)
            locate = partial(_locate, archive=archive, folder=folder, file=file)
            return _located(
                follow(_read_record(archive, pickled, file)), locate, depth, iter(range(MOST_MAPS))
            )


def begins_like_safetensors(file: BinaryIO) -> bool:
    """Whether it begins as files of that format do: with the length of a header in JSON."""
    start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def check_stored(path: str) -> None:
    """Raise ForeignError if the contents of an archive of torch's are compressed.

    Such a file must not be mapped into memory, where its tensors would be of other numbers; and a
    small one can hold more than there is memory for.
    """
    with zipfile.ZipFile(path) as archive:
        _check_stored(archive)


def map_tensors(path: str, tensors: Contents) -> dict[str, Any]:
    """Tensors of a file, mapped into memory: only what is looked at is read. Raises OSError."""
    size = os.path.getsize(path)
    return _views(torch.from_file(path, shared=False, size=size, dtype=torch.uint8), tensors)


# ---- The pickle ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """The name of a class or function, which is never looked up."""

    full: str


@dataclass(eq=False)
class Unmade:
    """Stands for an object that unpickling would make."""

    maker: Any = None  # what would have been called: a Name, if all is well
    arguments: Any = ()
    items: dict[str, Any] = field(default_factory=dict)  # what would have been set in it, by name


STORAGE = Name("a storage")  # makes, of its arguments, what torch keeps outside the pickle


def follow(pickled: bytes) -> Any:
    """What a pickle describes: numbers, texts, tuples, maps by name, and `Unmade` for all else.

    The members of lists and sets, what maps hold under other keys than texts, and the state of
    objects are left out. Raises errors of many types if the pickle is damaged.
    """
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(pickled):
        match opcode.name:
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "DUP":
                stack.append(stack[-1])
            case "POP" if marks[-1:] == [len(stack)]:
                marks.pop()
            case "POP" | "POP_MARK":
                _take(stack, marks, opcode)
            case name if name not in ("PROTO", "FRAME", "STOP"):
                stack.append(_result(name, value, _take(stack, marks, opcode)))
    return stack.pop()


def _take(stack: list[Any], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[Any]:
    """What an instruction takes off the stack."""
    takes = opcode.stack_before
    start = len(stack) - len(takes)
    if pickletools.markobject in takes:  # all above the last mark, which is not on our stack
        start = marks.pop() - takes.index(pickletools.markobject)
    if start < 0:
        raise IndexError("an instruction takes more than there is")
    taken = stack[start:]
    del stack[start:]
    return taken


def _result(opcode: str, value: Any, taken: list[Any]) -> Any:
    """What an instruction puts on the stack: always one thing."""
    match opcode, taken:
        case "GLOBAL", []:
            return Name(value.replace(" ", "."))
        case "STACK_GLOBAL", [str(module), str(name)]:
            return Name(f"{module}.{name}")
        case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX", [maker, arguments, *_]:
            return Unmade(maker, arguments)
        case "OBJ", [maker, *arguments]:
            return Unmade(maker, tuple(arguments))
        case "INST", arguments:
            return Unmade(Name(value.replace(" ", ".")), tuple(arguments))
        case "BINPERSID", [arguments]:
            return Unmade(STORAGE, arguments)
        case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER", []:
            return Unmade()
        case "EMPTY_LIST" | "LIST" | "EMPTY_SET" | "FROZENSET", _:
            return Unmade()
        case "APPEND" | "APPENDS" | "ADDITEMS" | "BUILD" | "READONLY_BUFFER", [target, *_]:
            return target
        case "SETITEM" | "SETITEMS", [target, *items]:
            _items(target).update(_by_name(items))
            return target
        case "EMPTY_DICT" | "DICT", items:
            return _by_name(items)
        case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE", items:
            return tuple(items)
        case "NEWTRUE" | "NEWFALSE", []:
            return opcode == "NEWTRUE"
    return value


def _by_name(items: list[Any]) -> dict[str, Any]:
    pairs = zip(items[::2], items[1::2], strict=True)
    return {key: value for key, value in pairs if isinstance(key, str)}


def _located(
    target: Any, locate: Callable[[Any], StoredTensor | None], depth: int, left: Iterator[int]
) -> Contents:
    """The items of a map in their places; left: as many as maps may still be looked at."""
    if next(left, None) is None:
        return {}
    contents = {}
    for name, each in _items(target).items():
        inner = _items(each) and depth > 1 and _located(each, locate, depth - 1, left)
        contents[name] = locate(each) or inner or None
    return contents


def _items(target: Any) -> dict[str, Any]:
    """The items of a map, also of one of an unknown kind; of all else none."""
    if isinstance(target, Unmade):
        return target.items
    return target if isinstance(target, dict) else {}


# ---- The archive -----------------------------------------------------------------------------

PICKLE = "data.pkl"
LONGEST_BYTE_ORDER = 16  # bytes: "little" and "big" are what there is
MOST_DIMENSIONS = 8

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
}


def _pickle(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    for name in names:
        if name.count("/") == 1 and name.endswith(f"/{PICKLE}"):
            return name
    message = "this is a zip archive, but not one of torch's"
    if not names:
        raise ForeignError(f"{message}: it is empty", "take another file")
    raise ForeignError(f"{message}: it holds '{shown(names[0])}'", "unpack it")


def _check_stored(archive: zipfile.ZipFile) -> None:
    for record in archive.infolist():
        is_read = record.filename.partition("/")[2].startswith(("data", "byteorder"))
        if is_read and record.compress_type != zipfile.ZIP_STORED:
            raise ForeignError(
                "its records are compressed",
                "pack them anew without compression: unzip it, then zip -0 -r",
            )


def _check_byte_order(archive: zipfile.ZipFile, record: str, file: BinaryIO) -> None:
    if record not in archive.namelist():
        return  # torch before 2.0, which wrote little-endian numbers, as nearly all machines do
    order = _read_record(archive, record, file, LONGEST_BYTE_ORDER).decode()
    if order != sys.byteorder:
        raise ForeignError(
            f"its numbers are {shown(order)}-endian, this machine's {sys.byteorder}",
            "save it anew with torch on this machine",
        )


def _read_record(
    archive: zipfile.ZipFile, name: str, file: BinaryIO, most: int | None = None
) -> bytes:
    """The bytes of a record, as many as the file has, and `most` at most."""
    _, size = _record(archive, name, file)
    if most is not None and size > most:
        raise ValueError(f"its record {shown(name)} is damaged")
    return archive.read(name)


def _locate(
    described: Any, archive: zipfile.ZipFile, folder: str, file: BinaryIO
) -> StoredTensor | None:
    """Where the tensor is that a pickle describes; None: it describes none."""
    match described:
        case Unmade(Name("torch._utils._rebuild_parameter"), (tensor, *_)):
            return _locate(tensor, archive, folder, file)
        case Unmade(
            Name("torch._utils._rebuild_tensor_v2"),
            (Unmade(maker, ("storage", Name(kind), str(key), *_)), offset, shape, stride, *_),
        ) if maker == STORAGE and kind in DTYPES and _are_sizes(offset, shape, stride):
            dtype = DTYPES[kind]
            start, nbytes = _record(archive, f"{folder}data/{key}", file)
            first = offset * dtype.itemsize
            tensor = StoredTensor(start + first, dtype, shape, stride)
            if first + tensor.nbytes > nbytes:
                raise ValueError(f"a tensor reaches beyond its record, {shown(key)}")
            return tensor
    return None


def _are_sizes(offset: Any, shape: Any, stride: Any) -> bool:
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        return False
    sizes = (offset, *shape, *stride)
    return len(shape) <= MOST_DIMENSIONS and all(
        type(size) is int and 0 <= size < 2**63 for size in sizes
    )


def _record(archive: zipfile.ZipFile, name: str, file: BinaryIO) -> tuple[int, int]:
    """Where a record's bytes begin in the file, and how many they are."""
    record = archive.getinfo(name)
    file.seek(record.header_offset)
    header = file.read(30)  # then name and padding, whose lengths are at its end
    start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    size = record.file_size
    if not header.startswith(b"PK\3\4") or start + size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"its record {shown(name)} is damaged")
    return start, size


def _views(data: torch.Tensor, contents: Any) -> Any:
    """The tensors in these bytes, in the same maps."""
    if isinstance(contents, StoredTensor):
        return _view(data, contents)
    return contents and {name: _views(data, each) for name, each in contents.items()}


def _view(contents: torch.Tensor, tensor: StoredTensor) -> torch.Tensor:
    data = contents[tensor.start : tensor.start + tensor.nbytes]
    if tensor.start % tensor.dtype.itemsize:  # as in archives that torch did not write
        data = data.clone()
    return data.view(tensor.dtype).as_strided(tensor.shape, tensor.stride)
