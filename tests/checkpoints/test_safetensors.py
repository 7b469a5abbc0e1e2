"""Files of safetensors: the same tensors as that package reads, and clear words for damage."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from guided_diffusion.checkpoints.lightning import (
    ForeignError,
    begins_like_safetensors,
    map_tensors,
)
from guided_diffusion.checkpoints.safetensors import read_state_dict

TENSORS = {
    "matrix": torch.randn(6, 8, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(3, 2, 5).half(),
    "bfloat16": torch.randn(4).bfloat16(),
    "double": torch.randn(2, 3, 4, 5).double(),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "integers": torch.arange(5),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(2, 0, 3),
}


def by_hand(path: Path, header: object, data: bytes = b"\0" * 8, length: int | None = None) -> str:
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written) if length is None else length) + written + data)
    return str(path)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_tensors_of_every_type_come_out_to_the_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"made": "by a test"})
    found = map_tensors(str(path), read_state_dict(str(path)))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        same = found[name].view(torch.uint8) if tensor.dim() else found[name]
        wanted = tensor.view(torch.uint8) if tensor.dim() else tensor
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride(), name
        assert torch.equal(same, wanted), name


def test_a_type_that_is_not_known_is_none(tmp_path):
    assert read_state_dict(by_hand(tmp_path / "x", entry("F4"))) == {"a": None}


@pytest.mark.parametrize("kept", [-1, -100, 20, 9])
def test_a_file_that_broke_off(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with open(path, "rb") as file:
        assert begins_like_safetensors(file)
    with pytest.raises(ForeignError, match="the file is incomplete, its end is missing"):
        read_state_dict(str(path))


@pytest.mark.parametrize(
    "header",
    [
        entry(shape=(3,)),
        entry(shape=(-2,)),
        entry(shape=(2.0,)),
        entry(offsets=(4, 8)),
        entry(offsets=(-8, 0)),
        entry(offsets=(8, 0)),
        entry(shape=(2**62, 4), offsets=(0, 0)),
        entry(shape="xx"),
        entry(offsets=(0,)),
        {"a": {}},
        {"a": 5},
        [],
    ],
    ids=json.dumps,
)
def test_a_header_that_is_wrong(tmp_path, header):
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        read_state_dict(by_hand(tmp_path / "x", header))


@pytest.mark.parametrize(
    "start", [b"", b"PK\3\4", b"\x80\2}q", b"<!DOCTYPE html>", b"\xff" * 8 + b"{", b"\0" * 9]
)
def test_other_files_do_not_begin_like_one(tmp_path, start):
    (tmp_path / "x").write_bytes(start)
    with open(tmp_path / "x", "rb") as file:
        assert not begins_like_safetensors(file)


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 10**6), junk=st.binary(min_size=1, max_size=20))
def test_no_damage_makes_tensors_that_are_not_in_the_file(tmp_path_factory, place, junk):
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    place %= len(data)
    path.write_bytes(data[:place] + junk + data[place + len(junk) :])
    try:
        stored = read_state_dict(str(path))
    except Exception:
        return
    for each in filter(None, stored.values()):
        assert each.start >= 0 and each.start + each.nbytes <= path.stat().st_size
    map_tensors(str(path), stored)
