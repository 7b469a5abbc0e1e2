"""Files in the format safetensors: where their tensors are.

Eight bytes tell how long a header in JSON is; it tells type, shape and place of each tensor in what
follows. The format is so simple that its package need not be installed, and so the tensors can be
mapped into memory as those of other files are.
"""

import json
import os
from itertools import accumulate
from math import prod
from typing import Any

import torch

from guided_diffusion.checkpoints.lightning import ForeignError, StoredTensor, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_state_dict(path: str) -> dict[str, StoredTensor | None]:
    """What a file holds, by name. None: numbers of a type that is not known.

    Raises OSError, ForeignError, and errors of many types if the file is damaged.
    """
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length + 8 > size:
            raise _incomplete()
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {name: _locate(name, entry, 8 + length, size) for name, entry in entries.items()}


def _locate(name: str, entry: dict[str, Any], start: int, size: int) -> StoredTensor | None:
    """Where a tensor is. start: of all tensors. size: of the file."""
    dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        return None
    sizes_fit = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not sizes_fit or end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"the place of {shown(name)} in it does not fit its shape")
    if start + end > size:
        raise _incomplete()
    stride = [*accumulate(shape[:0:-1], lambda step, side: step * max(side, 1), initial=1)][::-1]
    return StoredTensor(start + begin, dtype, tuple(shape), tuple(stride if shape else ()))


def _incomplete() -> ForeignError:
    return ForeignError("the file is incomplete, its end is missing", "fetch it again")
