"""Files of PyTorch Lightning: the tensors come out to the bit, and nothing in a file ever runs."""

import builtins
import collections
import datetime
import enum
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import types
import zipfile
from importlib import import_module
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.checkpoints.lightning import (
    STORAGE,
    ForeignError,
    Name,
    Unmade,
    check_stored,
    follow,
    map_tensors,
    read_state_dict,
    shown,
)

ROOT = Path(__file__).parents[2]
GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(6, 8, generator=GENERATOR)
TENSORS = {
    "matrix": MATRIX,
    "transposed": MATRIX.t(),
    "corner": MATRIX[2:, 3:],
    "every.second": MATRIX[::2, ::2],
    "the same": MATRIX,
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "repeated": torch.tensor([1.5]).expand(4, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(2, 0, 3),
    "half": MATRIX.half(),
    "bfloat16": MATRIX.bfloat16(),
    "double": MATRIX.double(),
    "parameter": torch.nn.Parameter(MATRIX[1]),
}


def read(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    stored = read_state_dict(str(path))
    return map_tensors(str(path), {name: each for name, each in stored.items() if each})


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name], tensor.detach()), name


# ---- Tensors ----


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict], ids=lambda kind: kind.__name__)
def test_tensors_of_every_kind_come_out_to_the_bit(tmp_path, protocol, wrap):
    contents = {"epoch": 3, "state_dict": wrap(TENSORS), "loss": torch.ones(3)}
    torch.save(contents, tmp_path / "x.ckpt", pickle_protocol=protocol)
    assert_equal(read(tmp_path / "x.ckpt"), TENSORS)


def test_what_is_saved_without_anything_around_it(tmp_path):
    torch.save(TENSORS, tmp_path / "plain.pt")
    assert_equal(read(tmp_path / "plain.pt"), TENSORS)


def test_a_module_s_own_state_dict_which_has_attributes(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(1, 3))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "x.ckpt")
    assert_equal(read(tmp_path / "x.ckpt"), dict(module.state_dict()))
    assert hasattr(module.state_dict(), "_metadata")


def test_what_is_no_tensor_of_floating_point_numbers_is_none(tmp_path):
    others = {
        "integers": torch.arange(3),
        "bool": torch.zeros(2, dtype=torch.bool),
        "sparse": torch.eye(3).to_sparse(),
        "numpy": np.float32(1),
        "array": np.zeros(3),
        "number": 0.5,
        "map": {"deeper": MATRIX},
        "nothing": None,
    }
    torch.save({"state_dict": {**others, "tensor": MATRIX, 5: MATRIX}}, tmp_path / "x.ckpt")
    stored = read_state_dict(str(tmp_path / "x.ckpt"))
    assert {name for name, each in stored.items() if each is None} == set(others)
    assert set(stored) == {*others, "tensor"}


def test_changing_a_mapped_tensor_leaves_the_file_as_it_was(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    for tensor in read(tmp_path / "x.pt").values():
        if 0 not in tensor.stride():
            tensor.zero_()
    assert (tmp_path / "x.pt").read_bytes() == before


def repacked(source: Path, target: Path, compression: int, comment: bytes = b"") -> None:
    """An archive with the same records, as another program would write it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        new.comment = comment
        for record in old.namelist():
            new.writestr(record, old.read(record))


@pytest.mark.parametrize("comment", [b"", b"by hand"])
def test_an_archive_that_another_program_packed_anew_loads(tmp_path, comment):
    """Its records begin anywhere, not at multiples of 64 bytes."""
    torch.save(TENSORS, tmp_path / "x.pt")
    repacked(tmp_path / "x.pt", tmp_path / "y.pt", zipfile.ZIP_STORED, comment)
    starts = [each.start for each in read_state_dict(str(tmp_path / "y.pt")).values()]
    assert any(start % 4 for start in starts)
    assert_equal(read(tmp_path / "y.pt"), TENSORS)


# ---- Files that are refused ----


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    repacked(tmp_path / "x.pt", tmp_path / "y.pt", zipfile.ZIP_DEFLATED)
    for read_it in (read_state_dict, check_stored):
        with pytest.raises(ForeignError, match="its records are compressed") as caught:
            read_it(str(tmp_path / "y.pt"))
        assert caught.value.remedy.startswith("pack them anew without compression")


@pytest.mark.parametrize("record", ["data.pkl", "byteorder", "data/0"])
def test_one_compressed_record_is_refused_before_it_is_read(tmp_path, monkeypatch, record):
    """A small file may unpack to more than there is memory for."""
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for name in ("data.pkl", "byteorder", "data/0"):
            packing = zipfile.ZIP_DEFLATED if name == record else zipfile.ZIP_STORED
            archive.writestr(f"x/{name}", b" " * 10**6, packing)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was read"))
    for read_it in (read_state_dict, check_stored):
        with pytest.raises(ForeignError, match="its records are compressed"):
            read_it(str(tmp_path / "x"))


def test_a_byte_order_that_is_none_is_shown_short_or_not_at_all(tmp_path):
    path = archive_of(tmp_path / "x", {}, {"byteorder": b"\x1b[2Jmiddle"})
    with pytest.raises(ForeignError, match=r"its numbers are \\x1b\[2Jmiddle-endian, this mach"):
        read_state_dict(path)
    path = archive_of(tmp_path / "x", {}, {"byteorder": b"little" + b" " * 11})
    with pytest.raises(ValueError, match="record x/byteorder is damaged"):
        read_state_dict(path)


def test_what_a_file_says_is_shown_short_and_without_commands_to_a_terminal():
    assert shown("input_blocks.0.ä'\\") == "input_blocks.0.ä'\\"
    assert shown("\x1b[2J\n\x07\u202e\ud800") == r"\x1b[2J\n\x07\u202e\ud800"
    assert shown("x" * 80) == "x" * 80 and shown("x" * 10**6) == "x" * 77 + "..."
    assert shown("\0" * 21) == r"\x00" * 19 + r"\..." and shown("abcdef", 5) == "ab..."


class Pickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> tuple | None:
        return thing.pid if isinstance(thing, Storage) else None


def archive_of(path: Path, contents: object, records: dict[str, bytes]) -> str:
    """An archive with this pickle, whose tensors are given by `Storage`."""
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(contents)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", buffer.getvalue())
        for name, data in records.items():
            archive.writestr(f"x/{name}", data)
    return str(path)


class Storage:
    def __init__(self, key="0", kind=torch.FloatStorage):
        self.pid = ("storage", kind, key, "cpu", 6)


class Call:
    """Is pickled as a call, or as what else `__reduce__` may give."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """Only so that it can be pickled as what is called."""


class Rebuilt:
    """Is pickled as a call of torch's function with these arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (*self.arguments, False, collections.OrderedDict())


SIX = struct.pack("<6f", *range(6))


def test_a_file_made_by_hand(tmp_path):
    path = archive_of(tmp_path / "x", {"a": Rebuilt(Storage(), 1, (2, 2), (2, 1))}, {"data/0": SIX})
    assert read(path)["a"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (7,), (1,)), (3, (2, 2), (2, 1)), (6, (), ()), (0, (2, 2), (9, 1)), (10**12, (1,), (1,))],
)
def test_a_tensor_that_reaches_beyond_its_record(tmp_path, offset, shape, stride):
    tensor = Rebuilt(Storage(), offset, shape, stride)
    path = archive_of(tmp_path / "x", {"a": tensor}, {"data/0": SIX, "data/1": SIX})
    with pytest.raises(ValueError, match="reaches beyond its record"):
        read_state_dict(path)


def test_the_largest_numbers_that_a_shape_may_have(tmp_path):
    shape, stride = (1,) * 7 + (2**63 - 1,), (2**63 - 1,) * 7 + (0,)
    path = archive_of(tmp_path / "x", {"a": Rebuilt(Storage(), 5, shape, stride)}, {"data/0": SIX})
    stored = read_state_dict(path)["a"]
    assert (stored.shape, stored.stride, stored.nbytes) == (shape, stride, 4)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(-1, (2,), (1,)), (0, (-2,), (1,)), (3, (2,), (-1,)), (0, (2, 2), (1,)), (0, [2], [1])]
    + [(0, (10**6000,), (0,)), (0, (2**63,), (0,)), (0, (1,), (2**63,)), (2**63, (0,), (1,))]
    + [(0, (1,) * 9, (1,) * 9)]
    + [(0.0, (2,), (1,)), (0, (2.0,), (1,)), (0, (True,), (1,)), (None, (2,), (1,)), (0, 2, 1)],
)
def test_numbers_that_are_no_shape_make_no_tensor(tmp_path, offset, shape, stride):
    tensor = Rebuilt(Storage(), offset, shape, stride)
    path = archive_of(tmp_path / "x", {"a": tensor}, {"data/0": SIX})
    assert read_state_dict(path) == {"a": None}


@pytest.mark.parametrize(
    "storage",
    [Storage(kind=torch.IntStorage), Storage(kind=os.system), Storage(key=0), "0", None]
    + [Call(os.mkdir, Storage().pid), Storage().pid],
)
def test_what_is_no_storage_makes_no_tensor(tmp_path, storage):
    tensor = Rebuilt(storage, 0, (2,), (1,))
    path = archive_of(tmp_path / "x", {"a": tensor}, {"data/0": SIX})
    assert read_state_dict(path) == {"a": None}


def test_a_record_that_is_missing(tmp_path):
    path = archive_of(tmp_path / "x", {"a": Rebuilt(Storage(), 0, (2,), (1,))}, {"data/1": SIX})
    with pytest.raises(KeyError, match="data/0"):
        read_state_dict(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
@pytest.mark.parametrize(
    ("entry", "offset", "damage"),
    [
        (b"PK\3\4", 0, b"PK\3\5"),  # what begins a record
        (b"PK\1\2", 20, struct.pack("<II", 2**30, 2**30)),  # its size by the table of contents
    ],
)
def test_a_record_that_is_damaged(tmp_path, record, entry, offset, damage):
    tensor = Rebuilt(Storage(), 0, (2,), (1,))
    path = Path(archive_of(tmp_path / "x", {"a": tensor}, {"data/0": SIX}))
    data = bytearray(path.read_bytes())
    place = (data.index if record == "data.pkl" else data.rindex)(entry) + offset
    data[place : place + len(damage)] = damage
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"record x/{record} is damaged"):
        read_state_dict(str(path))


@pytest.mark.parametrize("order", ["little", "big"])
def test_numbers_of_another_kind_of_machine_are_refused(tmp_path, order):
    contents = {"a": Rebuilt(Storage(), 0, (6,), (1,))}
    path = archive_of(tmp_path / "x", contents, {"data/0": SIX, "byteorder": order.encode()})
    if order == sys.byteorder:
        assert read(path)["a"].tolist() == list(range(6))
    else:
        with pytest.raises(ForeignError, match=f"its numbers are {order}-endian"):
            read_state_dict(path)


def test_files_that_are_not_read_here(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("last.ckpt", b"x")
    with pytest.raises(ForeignError, match="not one of torch's: it holds 'last.ckpt'$") as caught:
        read_state_dict(str(tmp_path / "other.zip"))
    assert caught.value.remedy == "unpack it"
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(ForeignError, match="not one of torch's: it is empty"):
        read_state_dict(str(tmp_path / "empty.zip"))
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ForeignError, match="file of torch before 1.6$") as caught:
        read_state_dict(str(tmp_path / "old.pt"))
    assert caught.value.remedy == "save it anew with a later one"
    with pytest.raises(FileNotFoundError):
        read_state_dict(str(tmp_path / "missing.ckpt"))


@pytest.mark.parametrize("contents", [[MATRIX], MATRIX, "text", None, {"state_dict": [MATRIX]}])
def test_a_file_without_names_holds_nothing(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pt")
    assert read_state_dict(str(tmp_path / "x.pt")) == {}


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 10**6), junk=st.binary(min_size=1, max_size=20))
def test_no_damage_makes_tensors_that_are_not_in_the_file(tmp_path_factory, place, junk):
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    torch.save({"state_dict": TENSORS}, path)
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + junk + data[place + len(junk) :])
    try:
        stored = read_state_dict(str(path))
    except Exception:
        return
    for each in filter(None, stored.values()):
        assert each.start >= 0 and each.start + each.nbytes <= path.stat().st_size


# ---- Pickles ----

RECURSIVE = []
RECURSIVE.append((RECURSIVE, RECURSIVE))
PLAIN = {
    "numbers": (0, 1, 255, 256, -1, 2**31, -(2**70), 2**3000, 0.5, -1e300),
    "texts": ("", "a", "ä\u20ac\U0001f600", "x" * 300, "two\nlines"),
    "constants": (None, True, False),
    "tuples": ((), (1,), (1, 2), (1, 2, 3), tuple(range(4)), (((),),)),
    "maps": {"one": {"two": {}}, "": {str(i): i for i in range(2000)}},
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_that_unpickling_makes(protocol):
    twice = {"first": PLAIN, "again": (PLAIN, PLAIN)}
    assert follow(pickle.dumps(twice, protocol)) == twice


@pytest.mark.parametrize("protocol", range(6))
def test_what_stands_around_objects_stays_in_its_place(protocol):
    """Also around tuples that hold themselves, which pickles take off the stack again."""
    for thing in ([1, [2]], {1, 2}, frozenset({3}), b"bytes", RECURSIVE, RECURSIVE[0], print, 1j):
        found = follow(pickle.dumps({"before": 1, "thing": thing, "after": (2, 3)}, protocol))
        assert list(found) == ["before", "thing", "after"]
        assert (found["before"], found["after"]) == (1, (2, 3))


def test_what_an_object_would_be_made_of_is_noted():
    found = follow(pickle.dumps(datetime.timedelta(1, 2, 3), 2))
    assert isinstance(found, Unmade) and found.maker == Name("datetime.timedelta")
    assert found.arguments == (1, 2, 3)
    counter = follow(pickle.dumps(collections.OrderedDict(a=1), 4))
    assert counter.maker == Name("collections.OrderedDict") and counter.items == {"a": 1}


MARK, STOP = b"(", b"."
RARE = {  # instructions that no pickler of today writes, or only to one that knows
    "INST": (b"(I1\nios\nsystem\n.", (Name("os.system"), (1,))),
    "OBJ": (b"(cos\nsystem\nI1\no.", (Name("os.system"), (1,))),
    "NEWOBJ_EX": (b"cos\nsystem\n(I1\nt}\x92.", (Name("os.system"), (1,))),
    "PERSID": (b"Psomewhere\n.", (None, ())),
    "BINPERSID": (b"(I1\ntQ.", (STORAGE, (1,))),
    "EXT1": (b"\x82\x01.", (None, ())),
    "EXT2": (b"\x83\x01\x01.", (None, ())),
    "EXT4": (b"\x84\x01\x01\x01\x01.", (None, ())),
    "NEXT_BUFFER": (b"\x97.", (None, ())),
    "READONLY_BUFFER": (b"\x97\x98.", (None, ())),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_instructions(name):
    pickled, (maker, arguments) = RARE[name]
    found = follow(pickled)
    assert isinstance(found, Unmade) and (found.maker, found.arguments) == (maker, arguments)
    assert name in {opcode.name for opcode, *_ in pickletools.genops(pickled)}


@pytest.mark.parametrize(
    ("pickled", "expected"),
    [
        (b"I1\n2.", 1),  # DUP
        (b"I1\n(0.", 1),  # POP of a mark
        (b"I1\nI2\n0.", 1),  # POP of a value
        (b"I1\n(I2\nI3\n1.", 1),  # POP_MARK
        (b"I1\n(I2\n(I3\ntt.", (2, (3,))),
        (b"(S'a'\nI1\nd.", {"a": 1}),
        (b"}S'a'\nI1\ns.", {"a": 1}),
        (b"}(S'a'\nI1\nS'b'\nI2\nu.", {"a": 1, "b": 2}),
        (b"I1\np5\n0g5\n.", 1),
        (b"I01\n.", True),
        (b"}(lI1\ns.", {}),  # a key that no map can have
    ],
)
def test_the_stack(pickled, expected):
    assert follow(pickled) == expected


def test_every_instruction_has_been_tried():
    tried = {name for name in RARE} | {"DUP", "POP", "POP_MARK", "DICT", "SETITEM", "SETITEMS"}
    things = [PLAIN, [1], [1, 2], {1}, frozenset({1}), RECURSIVE, RECURSIVE[0], b"", b"x" * 300]
    things += [bytearray(b"x"), types.SimpleNamespace(a=1), Missing(), print, 1j]
    things += [collections.OrderedDict(a=1), 2**3000]
    for thing in things:
        for protocol in range(6):
            pickled = pickle.dumps(thing, protocol)
            follow(pickled)
            tried |= {opcode.name for opcode, *_ in pickletools.genops(pickled)}
    long_ones = {"BINUNICODE8", "BINBYTES8", "LONG4", "LONG_BINGET", "LONG_BINPUT"}
    of_python_2 = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
    assert {opcode.name for opcode in pickletools.opcodes} - tried <= long_ones | of_python_2
    assert follow(b"\x8d\x01\0\0\0\0\0\0\0a.") == "a" and follow(b"T\x01\0\0\0a.") == "a"
    assert follow(b"U\x01a.") == "a" and follow(b"K\x01r\0\1\0\x000j\0\1\0\0.") == 1
    assert follow(b"\x8e\x01\0\0\0\0\0\0\0a.") == b"a" and follow(b"\x8b\x01\0\0\0\x05.") == 5


@pytest.mark.parametrize(
    "pickled",
    [b".", b"R.", b"I1\nR.", b"t.", b"I1\n", b"", b"g1\n.", b"p1\n.", b"2.", b"(S'a'\nd.", b"\xff."]
    + [b"I1\n\x87.", b"u.", b"(u.", b"0.", b"1.", b"\x94."],
)
def test_damaged_pickles_raise(pickled):
    with pytest.raises((ValueError, IndexError, KeyError, TypeError)):
        follow(pickled)


def test_pickles_that_would_fill_the_memory_or_take_for_ever_do_not():
    doubled = b"\x86".join([b"I1\n2"] + [b"2"] * 60)  # a tuple of 2**60 ones
    assert follow(b"I1\nr\xff\xff\xff\xff.") == 1  # a memo of 4 billion places
    assert follow(b"}" + doubled + b"\x86I1\ns.") == {}  # whose hash would be computed
    assert follow(doubled + b"\x86S'x'\n\x93.") is None  # whose text would be written
    with pytest.raises(ValueError):
        follow(b"\x8e\0\0\0\0\0\1\0\0a.")  # bytes that are not there


# ---- Nothing runs ----

Missing = type("Missing", (), {"__module__": "not_installed"})
sys.modules["not_installed"] = types.ModuleType("not_installed")  # but where the file is written
sys.modules["not_installed"].Missing = Missing


class MapOfMine(dict):
    def __setitem__(self, key, value):
        os.mkdir("it-ran")


class ListOfMine(list):
    def append(self, value):
        os.mkdir("it-ran")

    extend = append


class StateOfMine:
    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        os.mkdir("it-ran")


class NewOfMine:
    def __getnewargs_ex__(self):
        return ("it-ran",), {"mode": 0o777}

    def __new__(cls, path, mode=None):
        os.mkdir(path)
        return object.__new__(cls)


class Kind(enum.Enum):
    ONE = 1


def hostile() -> dict[str, object]:
    """Objects that make a folder when unpickled, each in its own way."""
    torch_calls = torch._tensor._rebuild_from_type_v2
    return {
        "os.mkdir": Call(os.mkdir, ("it-ran",)),
        "eval": Call(eval, ("__import__('os').mkdir('it-ran')",)),
        "exec": Call(exec, ("import os; os.mkdir('it-ran')",)),
        "getattr": Call(Call(getattr, (Call(import_module, ("os",)), "mkdir")), ("it-ran",)),
        "apply": Call(map, (os.mkdir, ["it-ran"])),
        "torch": Call(torch_calls, (os.mkdir, type(None), ("it-ran",), None)),
        "dict": MapOfMine(a=1),
        "items": Call(MapOfMine, (), None, None, iter([("a", 1)])),
        "list": Call(ListOfMine, (), None, iter([1])),
        "state": StateOfMine(),
        "key": {Call(os.mkdir, ("it-ran",)): 1},
        "inside": [({"x": (Call(os.mkdir, ("it-ran",)),)},)],
        "new": object.__new__(NewOfMine),
    }


# What a training really leaves in a file, of packages that are not installed where it is read.
HARMLESS = {
    "missing": Missing(),
    "class": Missing,
    "numpy": (np.float64(1), np.arange(3), np.dtype("f4")),
    "torch": (torch.float32, torch.device("cpu"), torch.Size([1]), torch.nn.Linear(2, 2)),
    "others": [1j, slice(1), datetime.date(2022, 1, 1), PurePosixPath("a"), Kind.ONE, ..., print],
    "containers": [collections.defaultdict(int, a=1), collections.deque([1]), {1: 2}, {3}, b"x"],
    "attributes": types.SimpleNamespace(a=1),
    Missing: {"best_model_score": torch.tensor(0.1)},
}


def test_the_hostile_objects_would_run_if_they_were_let(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, thing in hostile().items():
        pickled = pickle.dumps(thing, 4 if name == "new" else 2)
        value = pickle.loads(pickled)
        if name == "apply":
            list(value)
        assert os.path.isdir("it-ran"), name
        os.rmdir("it-ran")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["beside", "inside", "around", "instead"])
def test_hostile_objects_change_nothing(tmp_path, monkeypatch, protocol, place):
    monkeypatch.chdir(tmp_path)
    harmless = {**hostile(), **HARMLESS}
    tensors = MapOfMine() if place == "around" else {}
    dict.update(tensors, {"before": MATRIX, **(hostile() if place == "inside" else {})})
    dict.update(tensors, {"after": MATRIX.t()})
    contents = {"callbacks": harmless, "state_dict": tensors, "hyper_parameters": [harmless]}
    if place == "instead":
        contents["state_dict"] = Call(os.mkdir, ("it-ran",))
    torch.save(contents, "x.ckpt", pickle_protocol=protocol)
    found = read("x.ckpt")
    assert not os.path.exists("it-ran")
    expected = {} if place == "instead" else {"before": MATRIX, "after": MATRIX.t()}
    assert_equal(found, expected)


@pytest.mark.slow
def test_the_python_interpreter_itself_sees_nothing_happen(tmp_path):
    """Its audit hook tells of every import, call of a system function, and unpickling."""
    contents = {"state_dict": {"a": MATRIX, **hostile()}, "callbacks": {**hostile(), **HARMLESS}}
    for protocol in (2, 5):
        torch.save(contents, tmp_path / f"{protocol}.ckpt", pickle_protocol=protocol)
    torch.save({"state_dict": {"a": MATRIX}}, tmp_path / "warm.ckpt")
    script = """
import sys
from guided_diffusion.checkpoints.lightning import map_tensors, read_state_dict
def read(path):
    stored = read_state_dict(path)
    return map_tensors(path, {name: each for name, each in stored.items() if each})
read("warm.ckpt")
seen, modules = [], set(sys.modules)
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)))
found = [*read("2.ckpt"), *read("5.ckpt")]
seen = [(event, arguments[0]) for event, arguments in seen]
print(sorted(set(seen)), found, set(sys.modules) - modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[('open', '2.ckpt'), ('open', '5.ckpt')] ['a', 'a'] set()"


def test_a_script_archive_of_torch_is_not_run_either(tmp_path):
    """`torch.load` would hand it to `torch.jit.load`."""
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, tmp_path / "x.ckpt")
    assert read(tmp_path / "x.ckpt") == {}


def test_names_are_those_of_builtins_and_modules():
    found = follow(pickle.dumps([builtins.eval], 2)[:2] + b"cbuiltins\neval\n.")
    assert found == Name("builtins.eval")
    assert follow(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.") == Name("builtins.eval")
