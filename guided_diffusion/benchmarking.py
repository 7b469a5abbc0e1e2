"""How fast a config's network is on this machine, beside the plain way and beside the ceiling."""

import contextlib
import json
import os
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import factory
from guided_diffusion.accel import FusedGroupNorm, Speed
from guided_diffusion.checkpoint import load_state_dict
from guided_diffusion.config import Config, UserError
from guided_diffusion.denoiser import Network, network_denoiser
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.measuring import (
    describe_machine,
    digits,
    example,
    note,
    page,
    random_checkpoint,
    room_on_gpu,
)
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.scheduler import count_evaluations, plain_times
from guided_diffusion.unet import AttentionBlock, UNet
from guided_diffusion.winograd import PackedConv2d, WinogradConv2d

# Evaluations come in pairs, a plain one and a fast one.
SECONDS_FOR_PAIRS = 90  # for as many as fit; a large network on two cores takes 5 to 20 s for one
LEAST_PAIRS, MOST_PAIRS = 3, 50

LARGEST = 6  # convolutions of the network that the ceiling is looked for among
CEILING_RUNS = 5  # of each, the best one counts
GPU_MATRIX = 8192  # side of a matrix product that keeps any GPU busy

STEPS_FOR_SAMPLER = 25


@dataclass(frozen=True)
class FirstEvaluation:
    """What a fresh process saw, up to the end of its first evaluation."""

    seconds_until: float  # from the start of the process until the evaluation begins
    seconds: float  # of the evaluation; it compiles and captures, where that was asked for
    peak_memory_bytes: int | None  # None: this system does not tell


@dataclass(frozen=True)
class Ceiling:
    """The most that this machine does in one precision."""

    tflops: float
    operation: str  # that reached it, in words


@dataclass(frozen=True)
class Figures:
    """What was measured; an evaluation is of one batch."""

    config: Config
    speed: Speed
    device: torch.device
    machine: str
    batch: int
    weights: int
    operations: int  # of an evaluation, a multiply-add counted as two
    evaluations_per_image: int
    times: list[float]  # milliseconds of each evaluation
    plain_times: list[float]
    shares: dict[str, float]  # part of the network -> its share of the time; {}: not known
    sampler_ms: float  # what the sampler adds to an evaluation
    ceiling: Ceiling
    first: FirstEvaluation

    @property
    def ms(self) -> float:
        return statistics.median(self.times)

    @property
    def plain_ms(self) -> float:
        return statistics.median(self.plain_times)

    @property
    def ratio_to_plain(self) -> float:
        return self.plain_ms / self.ms

    def tflops(self, ms: float) -> float:
        return self.operations / ms / 1e9

    def images_per_hour(self, ms: float) -> float:
        return self.batch * 3_600_000 / (ms * self.evaluations_per_image)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "machine": self.machine,
            "device": str(self.device),
            "precision": self.speed.precision,
            "speed": self.speed.describe(),
            "batch": self.batch,
            "evaluations_per_image": self.evaluations_per_image,
            "tflop_per_evaluation": self.operations / 1e12,
            "runs": len(self.times),
            "ms_per_evaluation": self.ms,
            "ms_spread": [min(self.times), max(self.times)],
            "plain_ms_per_evaluation": self.plain_ms,
            "plain_ms_spread": [min(self.plain_times), max(self.plain_times)],
            "ratio_to_plain": self.ratio_to_plain,
            "shares_of_time": self.shares,
            "sampler_ms_per_evaluation": self.sampler_ms,
            "images_per_hour": self.images_per_hour(self.ms),
            "tflops": self.tflops(self.ms),
            "ceiling_tflops": self.ceiling.tflops,
            "ceiling_operation": self.ceiling.operation,
            "share_of_ceiling": self.tflops(self.ms) / self.ceiling.tflops,
            "peak_memory_bytes": self.first.peak_memory_bytes,
            "seconds_to_first_evaluation": self.first.seconds_until,
            "seconds_of_first_evaluation": self.first.seconds,
        }

    def describe(self) -> str:
        """A table for people."""
        return page(self._head(), self._rows(), self._foot())

    def _head(self) -> list[str]:
        size = self.config.network.image_size
        return [
            f"{self.config.name}: network for {size}×{size} images, {self.weights / 1e6:.1f} M "
            f"weights, {digits(self.operations / 1e12)} TFLOP an evaluation of batch {self.batch}",
            f"machine: {self.machine}; device {self.device}",
            f"measured: {self.speed.describe()}",
        ]

    def _rows(self) -> list[tuple[str, str, str]]:
        both = (self.ms, self.times), (self.plain_ms, self.plain_times)
        medians = [ms for ms, _ in both]
        share = self.tflops(self.ms) / self.ceiling.tflops
        peak = self.first.peak_memory_bytes
        return [
            ("", "measured", "plain"),
            ("milliseconds an evaluation, median", *map(digits, medians)),
            ("    fastest", *(digits(min(times)) for _, times in both)),
            ("    slowest", *(digits(max(times)) for _, times in both)),
            *((f"    {part}", f"{share:.1%}", "") for part, share in self.shares.items()),
            ("    the sampler adds", digits(self.sampler_ms), ""),
            (
                f"images per hour, at {self.evaluations_per_image:,} evaluations",
                *(digits(self.images_per_hour(ms)) for ms in medians),
            ),
            ("TFLOP/s", *(digits(self.tflops(ms)) for ms in medians)),
            (f"    ceiling in {self.speed.precision}", digits(self.ceiling.tflops), ""),
            ("    share of it", f"{share:.0%}", ""),
            ("peak memory, GB", "unknown" if peak is None else digits(peak / 1e9), ""),
            ("seconds until the first evaluation", digits(self.first.seconds_until), ""),
            ("times as fast as plain", digits(self.ratio_to_plain), "1"),
        ]

    def _foot(self) -> list[str]:
        notes = [
            "plain: eager, fp32, NCHW, attention by explicit softmax, in a process of its own, as "
            f"the original runs. Both were evaluated {len(self.times)} times, in turns.",
            "TFLOP: a multiply-add counts as two, and a convolution as its plain sum of products. "
            "Winograd's need fewer, so that the share of the ceiling may exceed 100 %.",
            f"ceiling: {self.ceiling.operation}, the best of this network's large convolutions "
            "and of matrix products.",
            "memory and seconds: of a fresh process, from its start; its first evaluation took "
            f"{digits(self.first.seconds)} s.",
        ]
        if self.config.classifier:
            notes.append("The classifier that guides this config's sampling is not counted.")
        return notes


def measure(config: Config, settings: Sequence[str], batch: int) -> Figures:
    """Measure a config's denoising network, with random weights. Takes up to five minutes.

    settings: the KEY=VALUE pairs that the config was loaded with. Notes of progress go to stderr.
    Raises UserError for what the machine cannot do, or has no room for.
    """
    device = factory.pick_device(config.device)
    speed = factory.choose_speed(replace(config, classifier=None), device)
    times = factory.build_times(config)
    with torch.device("meta"):
        network = UNet(factory.unet_params(config.network))
    with random_checkpoint(network) as path, room_on_gpu(batch):
        note("starting a fresh process, for its memory and its first evaluation")
        first = run_first_evaluation(config.source, settings, path, batch)
        note("looking for the ceiling")
        ceiling = measure_ceiling(network, batch, speed, device)
        note("evaluating the network in turns with the plain one, for up to two minutes")
        here = replace(config, model_path=path)
        series, shares = _measure_network(here, speed, device, batch)
    return Figures(
        config=config,
        speed=speed,
        device=device,
        machine=describe_machine(device, torch.get_num_threads()),
        batch=batch,
        weights=sum(weight.numel() for weight in network.parameters()),
        operations=count_operations(network, batch),
        evaluations_per_image=count_evaluations(times),
        times=series[0],
        plain_times=series[1],
        shares=shares,
        sampler_ms=sampler_milliseconds(config, device, batch),
        ceiling=ceiling,
        first=first,
    )


# ---- Both networks ---------------------------------------------------------------------------


def plain_network(config: Config, device: torch.device) -> Network:
    """The denoising network, computed as the original does: eager, fp32, NCHW, plain attention."""
    with torch.device("meta"):
        network = UNet(factory.unet_params(config.network))
    network.to_empty(device="cpu").load_state_dict(load_state_dict(config.model_path))
    network.to(device).eval().requires_grad_(False)

    def evaluate(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH), _tf32(False, device):
            return network(*inputs)

    return evaluate


@torch.no_grad()
def _measure_network(
    config: Config, speed: Speed, device: torch.device, batch: int
) -> tuple[list[list[float]], dict[str, float]]:
    """Milliseconds of evaluations, and of as many plain ones; and see `time_shares`."""
    network = factory.build_network(config, device, speed)
    x, *others = example(factory.unet_params(config.network), batch, device)
    inputs = [x.contiguous(memory_format=torch.channels_last), *others]
    with _PlainProcess(config, device, batch) as plain:
        series = alternate(
            [lambda: milliseconds(lambda: network(*inputs), device), plain.milliseconds], device
        )
    opaque = speed.compile or device.type != "cpu"
    return series, {} if opaque else time_shares(network, inputs)


class _PlainProcess:
    """Evaluates the plain network in a process of its own, where nothing speeds up its memory."""

    def __init__(self, config: Config, device: torch.device, batch: int):
        with _environment("THP_MEM_ALLOC_ENABLE", "0"):  # see guided_diffusion/__init__.py
            self.pool = _fresh_process()
            self.pool.submit(_prepare_plain, config, device, batch).result()

    def __enter__(self) -> "_PlainProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def milliseconds(self) -> float:
        return self.pool.submit(_plain_milliseconds).result()


_plain: list[Any] = []  # in that process: what it evaluates, and where


def _prepare_plain(config: Config, device: torch.device, batch: int) -> None:
    inputs = example(factory.unet_params(config.network), batch, device)
    network = plain_network(config, device)
    _plain[:] = [lambda: network(*inputs), device]


@torch.no_grad()
def _plain_milliseconds() -> float:
    return milliseconds(*_plain)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def count_operations(network: UNet, batch: int) -> int:
    """Of one evaluation, without the additions of norms and activations; a multiply-add is two.

    network: on the meta device.
    """
    inputs = example(network.params, batch, "meta")
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


# ---- Where the time goes ---------------------------------------------------------------------

_PARTS = {
    PackedConv2d: "products of convolutions",
    nn.Conv2d: "products of convolutions",
    WinogradConv2d: "transforms of Winograd's convolutions",
    FusedGroupNorm: "norms and activations",
    GroupNorm32: "norms and activations",
    nn.SiLU: "norms and activations",
    AttentionBlock: "attention",
}


class _Stopwatch:
    """Seconds of each part, without those of the parts inside it."""

    def __init__(self, part: str):
        self.seconds: Counter[str] = Counter()
        self.parts = [part]  # that are being computed, the inmost last
        self.since = time.perf_counter()

    def note(self) -> None:
        now = time.perf_counter()
        self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    def enter(self, part: str) -> None:
        self.note()
        self.parts.append(part)

    def leave(self) -> None:
        self.note()
        self.parts.pop()


@torch.no_grad()
def time_shares(network: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """The share that each part has in an evaluation on a CPU; the network is not compiled."""
    network(*inputs)  # a warm-up
    watch = _Stopwatch("the rest")
    hooks = []
    for module in network.modules():
        if part := _PARTS.get(type(module)):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: watch.enter(part)))
            hooks.append(module.register_forward_hook(lambda *_: watch.leave()))
    network(*inputs)
    watch.note()
    for hook in hooks:
        hook.remove()
    return {part: taken / watch.seconds.total() for part, taken in watch.seconds.most_common()}


def sampler_milliseconds(config: Config, device: torch.device, batch: int) -> float:
    """What the sampler adds to an evaluation: its time with a network that computes nothing."""
    process = factory.build_process(config, device)
    p = factory.unet_params(config.network)
    output = torch.zeros(batch, p.out_channels, p.image_size, p.image_size, device=device)
    denoiser = network_denoiser(lambda x, t: output, process)
    times = plain_times(min(STEPS_FOR_SAMPLER, process.diffusion.num_timesteps))
    inpainter = Inpainter(denoiser, process.diffusion, times, p.image_size)
    image = torch.zeros(batch, 3, p.image_size, p.image_size)
    sampling = partial(inpainter.sample, image, image, range(batch))
    milliseconds(sampling, device)
    return milliseconds(sampling, device) / (len(times) - 1)


# ---- Time ------------------------------------------------------------------------------------


def alternate(timers: Sequence[Callable[[], float]], device: torch.device) -> list[list[float]]:
    """What each timer says, called in turns after a warm-up; as often as time allows."""
    for _ in range(3 if device.type == "cuda" else 1):
        for timer in timers:
            timer()
    series: list[list[float]] = [[] for _ in timers]
    end = time.monotonic() + SECONDS_FOR_PAIRS
    for i in range(MOST_PAIRS):
        for timer, times in zip(timers, series, strict=True):
            times.append(timer())
        if i + 1 >= LEAST_PAIRS and time.monotonic() > end:
            break
    return series


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call, by the device's own clock if it is a GPU of CUDA."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        function()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end)
    begun = time.perf_counter()
    function()
    if device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - begun) * 1000


# ---- The ceiling -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """3×3, of images in channels_last."""

    batch: int
    channels: int
    out_channels: int
    side: int

    @property
    def operations(self) -> int:
        return 2 * 9 * self.batch * self.side**2 * self.channels * self.out_channels

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
        shapes = (
            (self.batch, self.channels, self.side, self.side),
            (self.out_channels, self.channels, 3, 3),
        )
        x, weight = (
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
            for shape in shapes
        )
        return lambda: F.conv2d(x, weight, padding=1)

    def __str__(self) -> str:
        return (
            f"3×3 convolution of {self.channels} to {self.out_channels} channels at "
            f"{self.side}×{self.side}, batch {self.batch}"
        )


@dataclass(frozen=True)
class MatrixProduct:
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
        a = torch.randn(self.rows, self.inner, device=device).to(dtype)
        b = torch.randn(self.columns, self.inner, device=device).to(dtype)
        return lambda: F.linear(a, b)

    def __str__(self) -> str:
        return f"product of {self.rows}×{self.inner} and {self.inner}×{self.columns} matrices"


@torch.no_grad()
def measure_ceiling(network: UNet, batch: int, speed: Speed, device: torch.device) -> Ceiling:
    """The best of the network's large convolutions, and of matrix products.

    network: on the meta device.
    """
    convolutions = largest_convolutions(network, batch)
    # A convolution is nine such products, one for each of its taps.
    candidates = [
        *convolutions,
        *(MatrixProduct(c.batch * c.side**2, c.channels, c.out_channels) for c in convolutions),
    ]
    if device.type == "cuda":
        candidates.append(MatrixProduct(GPU_MATRIX, GPU_MATRIX, GPU_MATRIX))
    with _tf32(speed.precision == "tf32", device):
        return max(
            (_try(candidate, speed.dtype, device) for candidate in candidates),
            key=lambda ceiling: ceiling.tflops,
        )


def largest_convolutions(network: UNet, batch: int) -> list[Convolution]:
    """Those of 3×3 that most of the network's operations go into."""
    work: Counter[Convolution] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            shape = Convolution(batch, conv.in_channels, conv.out_channels, output.shape[2])
            work[shape] += shape.operations

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network(*example(network.params, batch, "meta"))
    for hook in hooks:
        hook.remove()
    return [convolution for convolution, _ in work.most_common(LARGEST)]


def _try(
    candidate: Convolution | MatrixProduct, dtype: torch.dtype, device: torch.device
) -> Ceiling:
    function = candidate.prepare(dtype, device)
    milliseconds(function, device)
    best = min(milliseconds(function, device) for _ in range(CEILING_RUNS))
    return Ceiling(candidate.operations / best / 1e9, str(candidate))


@contextlib.contextmanager
def _tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Whether a GPU may cut the factors of fp32 products to 11 bits."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn) if device.type == "cuda" else ()
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


# ---- A fresh process -------------------------------------------------------------------------


def run_first_evaluation(
    conf_path: str, settings: Sequence[str], model_path: str, batch: int
) -> FirstEvaluation:
    """Start a process that loads an inpainter and evaluates its network once."""
    # A JSON string is a YAML string too, whatever is in the path.
    settings = [*settings, f"model_path={json.dumps(model_path)}", "classifier_scale=0"]
    with _fresh_process() as pool:
        started = time.time()
        try:
            return pool.submit(first_evaluation, conf_path, settings, batch, started).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process that tries one evaluation was ended by the system, most likely for "
                f"lack of memory; batch size {batch}"
            ) from error


def _fresh_process() -> ProcessPoolExecutor:
    # On Ctrl-C, the parent has something to say, and the child ends without a word.
    silence = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), **silence)


class _Done(Exception):
    """The first evaluation is over."""


def first_evaluation(
    conf_path: str, settings: Sequence[str], batch: int, started: float
) -> FirstEvaluation:
    """Inpaint a black image up to the first evaluation. started: `time.time()`, of the process."""
    warnings.simplefilter("ignore")  # the parent has given the same warnings
    inpainter = factory.load_inpainter(conf_path, overrides=settings)
    begun = ended = 0.0

    def denoise(*arguments: Any) -> Any:
        nonlocal begun
        begun = time.time()
        return inpainter.denoiser(*arguments)

    def stop(done: int, total: int, x0: torch.Tensor) -> None:
        nonlocal ended
        x0.flatten()[0].item()  # until it is asked for, a GPU is still at work
        ended = time.time()
        raise _Done

    size = inpainter.image_size
    image = torch.full((batch, 3, size, size), -1.0)
    with contextlib.suppress(_Done):
        replace(inpainter, denoiser=denoise)(image, torch.zeros_like(image), progress=stop)
    return FirstEvaluation(begun - started, ended - begun, _peak_memory(inpainter.diffusion.device))


def _peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most: on a GPU of CUDA those there, else in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss counts what the parent held, see `man getrusage`
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "darwin":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
