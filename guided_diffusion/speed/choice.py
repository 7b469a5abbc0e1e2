"""Which precision, compiler and graph a network is computed with: what this machine offers."""

import importlib.util
import os
import shutil
import warnings
from dataclasses import dataclass

import torch

from guided_diffusion.config import SpeedConfig, UserError

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # on NVIDIA GPUs: products of fp32 numbers cut to 11 bits
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Speed:
    """How a network is computed, settled for this machine."""

    precision: str = "fp32"  # a key of DTYPES
    compile: bool = False
    cuda_graph: bool = False
    reason: str = ""  # why so, where `fast` chose it

    @property
    def dtype(self) -> torch.dtype:
        """Of the convolutions, the attention, and what goes between them."""
        return DTYPES[self.precision]

    def describe(self) -> str:
        parts = [self.precision]
        parts += ["compiled"] if self.compile else []
        parts += ["CUDA graph"] if self.cuda_graph else []
        return ", ".join(parts) + (f" ({self.reason})" if self.reason else "")


def choose_speed(
    wishes: SpeedConfig, use_fp16: bool, device: torch.device, fp16_key: str = "use_fp16"
) -> Speed:
    """What the config asks for, as far as this machine offers it.

    use_fp16: the precision of a config that leaves it open, by the key `fp16_key`. Raises
    UserError for what the machine cannot do; warns where it has no compiler, and does without.
    """
    best, reason = _fastest(device) if wishes.fast else (Speed(), "")
    precision = wishes.precision or best.precision
    found = f"precision: found {precision}"
    if use_fp16 and not wishes.precision and not wishes.fast:
        precision, found = "fp16", f"{fp16_key}: found true, without a precision"
    offered = offered_precisions(device)
    if precision not in offered:
        raise UserError(
            f"{found}; {_name(device)} offers {', '.join(offered)}: choose one, such as "
            f"--set precision={offered[-1]}"
        )
    if wishes.cuda_graph and device.type != "cuda":
        raise UserError(
            f"cuda_graph: found true; accepted on {device}: false, or null; it needs CUDA"
        )
    compiles = best.compile if wishes.compile is None else wishes.compile
    if compiles and (problem := _compiler_problem(device)):
        # From this line, whoever calls, so that it is shown once.
        warnings.warn(f"compile: {problem}; going on without", UserWarning, stacklevel=1)
        compiles = False
    cuda_graph = best.cuda_graph if wishes.cuda_graph is None else wishes.cuda_graph
    if wishes.fast and wishes.precision:
        reason = "fast, in the precision that the config asks for"
    return Speed(precision, compiles, cuda_graph, reason)


def offered_precisions(device: torch.device) -> list[str]:
    """What a device computes by itself; what it would emulate takes many times as long."""
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return ["fp32", "tf32", "bf16", "fp16"] if ampere else ["fp32", "fp16"]
    if device.type == "mps":
        return ["fp32", "fp16"]
    if not torch.backends.mkldnn.is_available():
        return ["fp32"]
    halves = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return ["fp32", *(precision for precision, is_supported in halves.items() if is_supported())]


def _fastest(device: torch.device) -> tuple[Speed, str]:
    """The best safe combination for a device, and why."""
    if device.type == "cuda":
        precision = "bf16" if "bf16" in offered_precisions(device) else "fp16"
        compiles = _compiler_problem(device) is None
        return Speed(precision, compiles, cuda_graph=True), f"fast: what {_name(device)} does best"
    if device.type == "cpu" and "bf16" in offered_precisions(device) and _multiplies_bf16():
        return Speed("bf16"), "fast: this CPU multiplies bf16 in hardware"
    return Speed("fp32"), f"fast: {_name(device)} is best at fp32"


def _multiplies_bf16() -> bool:
    return _has("_is_avx512_bf16_supported") or has_matrix_units()


def has_matrix_units() -> bool:
    """Whether the CPU has AMX, whose bf16 products are so fast that transforms do not pay."""
    return _has("_is_amx_tile_supported")


def _has(capability: str) -> bool:
    return getattr(torch.cpu, capability, lambda: False)()


def _name(device: torch.device) -> str:
    return {"cpu": "this CPU", "cuda": "this GPU"}.get(device.type, f"device {device}")


def _compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work here; None: it can."""
    if device.type == "cpu":
        compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
        found = any(map(shutil.which, compilers))
        return None if found else "no C++ compiler was found (on Debian or Ubuntu: apt install g++)"
    if device.type == "cuda":
        found = importlib.util.find_spec("triton")
        return None if found else "the package triton was not found"
    return f"not tried on device {device}"
