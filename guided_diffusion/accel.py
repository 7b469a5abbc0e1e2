"""The same network, computed faster: precision, layers for CPUs, compiler, CUDA graph."""

import ctypes
import importlib.util
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.autoencoder import Autoencoder
from guided_diffusion.checkpoint import (
    LATENT_AUTOENCODER,
    Part,
    enough_memory,
    load_weights,
    place_copies,
)
from guided_diffusion.config import SpeedConfig, UserError
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.unet import Downsample, TimedNetwork, picture_scale
from guided_diffusion.winograd import PackedConv2d, WinogradConv2d

SMALL_PICTURE = 16 * 16  # pixels
CALLS_BEFORE_CAPTURE = 3

Function = Callable[..., torch.Tensor]

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


def load_network(
    network: TimedNetwork,
    path: str,
    speed: Speed,
    device: torch.device,
    gradients: bool = False,
    part: Part | None = None,
) -> Function:
    """A network on the meta device, filled from a checkpoint and ready to be evaluated fast.

    gradients: of its output with respect to x will be asked for. part: of the checkpoint, None:
    all. Raises UserError, as `checkpoint.load_weights`.
    """
    # Neither a compiler nor the backward pass can look into our own layers.
    plain = gradients or speed.compile
    if device.type == "cpu" and part is None:  # latents come in all sizes: pieces would add up
        keep_freed_memory()
    _fill(network, path, speed, device, convolution_sides(network), part, plain=plain)
    function = compiled(network) if speed.compile else network
    return CudaGraph(function) if speed.cuda_graph and not gradients else function


def load_autoencoder(
    autoencoder: Autoencoder, path: str, speed: Speed, device: torch.device, side: int
) -> Autoencoder:
    """The autoencoder, on the meta device, filled from a latent checkpoint; never compiled.

    It is called twice an image, so that only precision and layers pay. side: of the pictures that
    it is to be fastest for. Raises UserError, as `checkpoint.load_weights`.
    """
    sides = autoencoder.convolution_sides(side)
    _fill(autoencoder, path, speed, device, sides, LATENT_AUTOENCODER)
    return autoencoder


def _fill(
    network: TimedNetwork | Autoencoder,
    path: str,
    speed: Speed,
    device: torch.device,
    sides: dict[nn.Conv2d, int],
    part: Part | None = None,
    plain: bool = False,
) -> None:
    """Load a network's weights to a device, into layers for it. plain: into torch's own."""
    network.eval().convert_blocks(speed.dtype)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # graphs and events are made on the current one
        torch.backends.cuda.matmul.allow_tf32 = speed.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = speed.precision == "tf32"
    with enough_memory(path):
        if device.type == "cpu" and has_cpu_layers() and not plain:
            load_weights(network, path, CpuPlacement(network, sides), part)
            fuse_norms(network)
        else:
            load_weights(network, path, part=part)
        network.to(device).requires_grad_(False)


def has_cpu_layers() -> bool:
    """Whether this torch and this CPU have what `CpuPlacement` builds on."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


def compiled(function: Function) -> Function:
    """The function through torch.compile; after a warning the plain one, where that fails."""
    fast = torch.compile(function, dynamic=False)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal fast
        try:
            return fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error.__cause__)
            if isinstance(cause, torch.cuda.OutOfMemoryError):
                raise cause from error
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            warnings.warn(f"compile: {reason}; going on without", UserWarning, stacklevel=2)
            fast = function
        return function(*inputs)

    return call


class CudaGraph:
    """A function of CUDA tensors, captured once and replayed: one command instead of thousands.

    What it returns is overwritten by the next call. Inputs of other shapes are captured anew.
    """

    def __init__(self, function: Function):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[torch.Tensor] = []  # what the captured commands read
        self.output: torch.Tensor | None = None  # and write

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            self._capture(inputs)
        for captured, x in zip(self.inputs, inputs, strict=True):
            captured.copy_(x)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self.graph = self.output = None  # first, for their memory
        self.inputs = []
        torch.cuda.empty_cache()
        static = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up at the first calls is not to be captured
            for _ in range(CALLS_BEFORE_CAPTURE):
                self.function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.function(*static)
        self.graph, self.inputs, self.output = graph, static, output


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, where it is glibc.

    By default it hands them back, and the system then clears every page of the next one: about a
    sixth of an evaluation of a large network.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


class FusedGroupNorm(nn.Module):
    """GroupNorm32, and SiLU after it, in fewer passes over memory; on a CPU, without gradients.

    Statistics are in fp32; what goes in and out may be in bf16.
    """

    def __init__(self, norm: GroupNorm32, silu: bool):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `GroupNorm32.forward`."""
        weight, bias = self.norm.weight, self.norm.bias
        if scale is not None and len(x) == 1:  # the norm's own weights can take them in
            weight, bias = weight * (1 + scale[0]), bias * (1 + scale[0]) + shift[0]
        # On small pictures torch's group norm is much slower in bf16 than in fp32.
        h = x.float() if x.shape[2:].numel() <= SMALL_PICTURE else x
        h = F.group_norm(h, self.norm.num_groups, weight, bias, self.norm.eps).to(x.dtype)
        if scale is not None and len(x) > 1:
            scale, shift = ((s.to(x.dtype)[:, :, None, None]) for s in (1 + scale, shift))
            torch.addcmul(shift, h, scale, out=h)
        return F.silu(h, inplace=True) if self.silu else h


class CpuPlacement:
    """Places a checkpoint's weights into layers for a CPU, see `checkpoint.load_weights`."""

    def __init__(self, network: nn.Module, sides: dict[nn.Conv2d, int]):
        """sides: of the pictures that each convolution sees."""
        self.network, self.sides = network, sides

    def __call__(self, name: str, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        if isinstance(module, nn.Conv2d):
            parent, _, child = name.rpartition(".")
            side = self.sides[module]
            layer = fast_convolution(module, weights["weight"], weights["bias"], side)
            setattr(self.network.get_submodule(parent), child, layer)
        else:
            place_copies(name, module, weights)


def convolution_sides(network: TimedNetwork) -> dict[nn.Conv2d, int]:
    """The side of the pictures that each convolution works on; full outside of the blocks."""
    side = network.params.image_size
    sides = {conv: side for conv in network.modules() if isinstance(conv, nn.Conv2d)}
    for block in network.blocks():
        for layer in block:
            before, side = side, int(side * picture_scale(layer))
            seen = before if isinstance(layer, Downsample) else side  # there, the conv halves it
            sides |= {conv: seen for conv in layer.modules() if isinstance(conv, nn.Conv2d)}
    return sides


def fast_convolution(
    conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor, side: int
) -> nn.Module:
    """What computes this convolution fastest on a CPU, in its type. side: of its input."""
    dtype, shape = conv.weight.dtype, (1, conv.in_channels, side, side)
    if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
        m = winograd_tile(min(weight.shape[:2]), side, dtype)
        if m:
            return WinogradConv2d(weight, bias, shape, dtype, m=m)
    return PackedConv2d(weight, bias, shape, dtype, padding=conv.padding[0], stride=conv.stride[0])


def winograd_tile(channels: int, side: int, dtype: torch.dtype) -> int:
    """The m of F(m×m, 3×3) where its transforms cost less than what they save, else 0.

    By measurement; where pictures are small, the transformed weights, which are (m + 2)² / 9 times
    as large, would take more memory than the time is worth.
    """
    if channels < 192 or side % 8 or (dtype != torch.float32 and has_matrix_units()):
        return 0
    if dtype == torch.float32:
        return 4 if side >= 64 else 2 if side >= 32 else 0
    return 2 if side >= 16 else 0


def fuse_norms(network: nn.Module) -> None:
    """Put `FusedGroupNorm` in the place of each GroupNorm32 and of the SiLU after it."""
    for parent in list(network.modules()):
        children = [*parent.named_children(), ("", None)]
        for (name, child), (next_name, following) in pairwise(children):
            if not isinstance(child, GroupNorm32):
                continue
            has_silu = isinstance(following, nn.SiLU)
            setattr(parent, name, FusedGroupNorm(child, silu=has_silu))
            if has_silu:
                setattr(parent, next_name, nn.Identity())
