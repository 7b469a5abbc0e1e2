"""How fast a config's network is on this machine, beside the plain way and beside the ceiling."""

import contextlib
import json
import os
import signal
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import factory
from guided_diffusion.benchmark.setup import (
    describe_machine,
    digits,
    example,
    note,
    page,
    peak_memory,
    picture_side,
    random_checkpoint,
    room_on_gpu,
)
from guided_diffusion.checkpoints.loading import (
    LATENT_AUTOENCODER,
    Blank,
    Part,
    check_weights,
    load_weights,
)
from guided_diffusion.config import Config, UserError, load_config
from guided_diffusion.denoiser import Network, ddim, network_denoiser
from guided_diffusion.inpainter import PixelInpainter
from guided_diffusion.networks.layers import GroupNorm32
from guided_diffusion.networks.params import UNetParams
from guided_diffusion.networks.strips import Whole
from guided_diffusion.networks.unet import AttentionBlock, UNet
from guided_diffusion.scheduler import count_evaluations, plain_times
from guided_diffusion.speed.choice import Speed
from guided_diffusion.speed.cpu_layers import FusedGroupNorm
from guided_diffusion.speed.packed import PackedConv2d
from guided_diffusion.speed.winograd import WinogradConv2d

# Evaluations come in pairs, a plain one and a fast one; with latent diffusion, so do an encoding
# and a decoding of a picture after them.
SECONDS_FOR_PAIRS = 90  # for as many as fit; a large network on two cores takes 5 to 20 s for one
LEAST_PAIRS, MOST_PAIRS = 3, 50

LARGEST = 6  # convolutions of the network that the ceiling is looked for among
CEILING_RUNS = 5  # of each, the best one counts
GPU_MATRIX = 8192  # side of a matrix product that keeps any GPU busy

STEPS_FOR_SAMPLER = 25


@dataclass(frozen=True)
class FirstEvaluation:
    """What a fresh process saw, up to the picture that its first evaluation aims at."""

    seconds_until: float  # from the start of the process until the evaluation begins
    seconds: float  # of the evaluation; it compiles and captures, where that was asked for
    peak_memory_bytes: int | None  # None: this system does not tell


@dataclass(frozen=True)
class Ceiling:
    """The most that this machine does in one precision."""

    tflops: float
    operation: str  # that reached it, in words


@dataclass(frozen=True)
class Pairs:
    """Milliseconds of something, each time that it was done, and of the plain way."""

    times: list[float]
    plain_times: list[float]

    @property
    def ms(self) -> float:
        return statistics.median(self.times)

    @property
    def plain_ms(self) -> float:
        return statistics.median(self.plain_times)


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
    evaluation: Pairs
    coding: Mapping[str, Pairs]  # latent diffusion's "encode" and "decode" of one picture; or {}
    shares: dict[str, float]  # part of the network -> its share of the time; {}: not known
    sampler_ms: float  # what the sampler adds to an evaluation
    ceiling: Ceiling
    first: FirstEvaluation

    @property
    def ratio_to_plain(self) -> float:
        return self.evaluation.plain_ms / self.evaluation.ms

    def tflops(self, ms: float) -> float:
        return self.operations / ms / 1e9

    @property
    def images_per_hour(self) -> float:
        return self._images_per_hour(self.evaluation.ms, (c.ms for c in self.coding.values()))

    @property
    def plain_images_per_hour(self) -> float:
        coding = (c.plain_ms for c in self.coding.values())
        return self._images_per_hour(self.evaluation.plain_ms, coding)

    def _images_per_hour(self, ms: float, coding_ms: Iterable[float]) -> float:
        per_image = ms * self.evaluations_per_image / self.batch + sum(coding_ms)
        return 3_600_000 / per_image

    def to_json(self) -> dict[str, Any]:
        ms, plain_ms = self.evaluation.ms, self.evaluation.plain_ms
        times, plain_times = self.evaluation.times, self.evaluation.plain_times
        return {
            "name": self.config.name,
            "machine": self.machine,
            "device": str(self.device),
            "precision": self.speed.precision,
            "speed": self.speed.describe(),
            "batch": self.batch,
            "evaluations_per_image": self.evaluations_per_image,
            "tflop_per_evaluation": self.operations / 1e12,
            "runs": len(times),
            "ms_per_evaluation": ms,
            "ms_spread": [min(times), max(times)],
            "plain_ms_per_evaluation": plain_ms,
            "plain_ms_spread": [min(plain_times), max(plain_times)],
            "ratio_to_plain": self.ratio_to_plain,
            "shares_of_time": self.shares,
            "sampler_ms_per_evaluation": self.sampler_ms,
            "images_per_hour": self.images_per_hour,
            "tflops": self.tflops(ms),
            "ceiling_tflops": self.ceiling.tflops,
            "ceiling_operation": self.ceiling.operation,
            "share_of_ceiling": self.tflops(ms) / self.ceiling.tflops,
            "peak_memory_bytes": self.first.peak_memory_bytes,
            "seconds_to_first_evaluation": self.first.seconds_until,
            "seconds_of_first_evaluation": self.first.seconds,
            **self._coding_to_json(),
        }

    def _coding_to_json(self) -> dict[str, Any]:
        figures = {"image_size": picture_side(self.config)} if self.coding else {}
        for name, pairs in self.coding.items():
            figures |= {f"{name}_ms": pairs.ms, f"plain_{name}_ms": pairs.plain_ms}
        return figures

    def describe(self) -> str:
        """A table for people."""
        return page(self._head(), self._rows(), self._foot())

    def _head(self) -> list[str]:
        size = picture_side(self.config)
        return [
            f"{self.config.name}: network for {size}×{size} images, {self.weights / 1e6:.1f} M "
            f"weights, {digits(self.operations / 1e12)} TFLOP an evaluation of batch {self.batch}",
            f"machine: {self.machine}; device {self.device}",
            f"measured: {self.speed.describe()}",
        ]

    def _rows(self) -> list[tuple[str, str, str]]:
        both = self.evaluation.times, self.evaluation.plain_times
        medians = self.evaluation.ms, self.evaluation.plain_ms
        share = self.tflops(medians[0]) / self.ceiling.tflops
        images = self.images_per_hour, self.plain_images_per_hour
        peak = self.first.peak_memory_bytes
        return [
            ("", "measured", "plain"),
            ("milliseconds an evaluation, median", *map(digits, medians)),
            ("    fastest", *(digits(min(times)) for times in both)),
            ("    slowest", *(digits(max(times)) for times in both)),
            *((f"    {part}", f"{share:.1%}", "") for part, share in self.shares.items()),
            ("    the sampler adds", digits(self.sampler_ms), ""),
            *(
                (f"milliseconds to {name} an image, median", digits(c.ms), digits(c.plain_ms))
                for name, c in self.coding.items()
            ),
            (
                f"images per hour, at {self.evaluations_per_image:,} evaluations",
                *map(digits, images),
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
            f"the original runs. Both were evaluated {len(self.evaluation.times)} times, in turns.",
            "TFLOP: a multiply-add counts as two, and a convolution as its plain sum of products. "
            "Winograd's need fewer, so that the share of the ceiling may exceed 100 %.",
            f"ceiling: {self.ceiling.operation}, the best of this network's large convolutions "
            "and of matrix products.",
            "memory and seconds: of a fresh process, from its start; its first evaluation took "
            f"{digits(self.first.seconds)} s.",
        ]
        if self.coding:
            notes.append(
                "An evaluation is the U-Net's alone. The autoencoder's time counts in images per "
                "hour, and its memory in peak memory."
            )
        if self.config.classifier:
            notes.append("The classifier that guides this config's sampling is not counted.")
        return notes


def measure(config: Config, settings: Sequence[str], batch: int) -> Figures:
    """Measure a config's denoising network, with random weights. Takes up to five minutes.

    Of latent diffusion, the autoencoder is measured too, and `image_size` decides of what size.
    settings: the KEY=VALUE pairs that the config was loaded with. Notes of progress go to stderr.
    Raises UserError for what the machine cannot do, or has no room for.
    """
    device = factory.pick_device(config.device)
    speed = factory.choose_speed(replace(config, classifier=None), device)
    times = factory.build_times(config)
    networks = networks_of(config)
    network, *_ = networks.values()
    with random_checkpoint(networks) as path, room_on_gpu(batch):
        note("starting a fresh process, for its memory and its first evaluation")
        first = run_first_evaluation(config, settings, path, batch)
        note("looking for the ceiling")
        ceiling = measure_ceiling(network, batch, speed, device)
        note("computing in turns with the plain way, for up to two minutes")
        here = replace(config, model_path=path)
        pairs, shares = _measure_networks(here, speed, device, batch)
    return Figures(
        config=config,
        speed=speed,
        device=device,
        machine=describe_machine(device, torch.get_num_threads()),
        batch=batch,
        weights=sum(weight.numel() for weight in network.parameters()),
        operations=count_operations(network, batch),
        evaluations_per_image=count_evaluations(times),
        evaluation=pairs.pop("evaluate"),
        coding=pairs,
        shares=shares,
        sampler_ms=sampler_milliseconds(config, device, batch),
        ceiling=ceiling,
        first=first,
    )


def networks_of(config: Config) -> dict[Part | None, nn.Module]:
    """The networks of a config on the meta device, the U-Net first; see `random_checkpoint`."""
    blanks = factory.build_networks(replace(config, classifier=None))
    return {blank.part: blank.network for blank in blanks.values()}


# ---- Both ways -------------------------------------------------------------------------------

Functions = dict[str, Callable[[], torch.Tensor]]  # by name: "evaluate", perhaps "encode", "decode"


def plain_network(config: Config, device: torch.device) -> Network:
    """The denoising network, computed as the original does: eager, fp32, NCHW, plain attention."""
    part, network = next(iter(networks_of(config).items()))
    _load_plain(network, config.model_path, device, part)

    def evaluate(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH), _tf32(False, device):
            return network(*inputs)

    return evaluate


def plain_coders(config: Config, device: torch.device) -> tuple[Network, Network]:
    """The autoencoder's ways there and back, eager, in fp32 and NCHW, of whole pictures."""
    autoencoder = networks_of(config)[LATENT_AUTOENCODER]
    _load_plain(autoencoder, config.model_path, device, LATENT_AUTOENCODER)

    def encode(x: torch.Tensor) -> torch.Tensor:
        with _tf32(False, device):
            return autoencoder.quant_conv(autoencoder.encoder(Whole(x)).tensor)

    def decode(z: torch.Tensor) -> torch.Tensor:
        with _tf32(False, device):
            codes = autoencoder.post_quant_conv(autoencoder.quantize(z).contiguous())
            return autoencoder.decoder(Whole(codes)).tensor

    return encode, decode


def _load_plain(network: nn.Module, path: str, device: torch.device, part: Part | None) -> None:
    def place(name: str, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        for key, weight in weights.items():
            setattr(module, key, nn.Parameter(weight.clone(), requires_grad=False))

    (checkpoint,) = check_weights(Blank(network, path, part))
    load_weights(checkpoint, place).to(device).eval()


def _coding(config: Config, coders: tuple[Network, Network], device: torch.device) -> Functions:
    """What an autoencoder does with one picture."""
    encode, decode = coders
    p = config.latent.autoencoder.params
    side = config.latent.nominal_size // config.latent.factor
    z = torch.randn(1, p.embed_dim, side, side, device=device)
    x = torch.rand(1, p.in_channels, side * p.factor, side * p.factor, device=device) * 2 - 1
    return {"encode": lambda: encode(x), "decode": lambda: decode(z)}


def _unet_params(config: Config) -> UNetParams:
    return config.latent.unet_params if config.latent else config.network.params


@torch.no_grad()
def _measure_networks(
    config: Config, speed: Speed, device: torch.device, batch: int
) -> tuple[dict[str, Pairs], dict[str, float]]:
    """What each of the `Functions` takes; and see `time_shares`."""
    networks = factory.load_networks(replace(config, classifier=None), device, speed)
    network = networks["denoiser"]
    x, *others = example(_unet_params(config), batch, device)
    inputs = [x.contiguous(memory_format=torch.channels_last), *others]
    functions: Functions = {"evaluate": lambda: network(*inputs)}
    if config.latent:
        autoencoder = networks["autoencoder"]
        coders = autoencoder.encode, autoencoder.decode
        functions |= _coding(config, coders, device)
    with _PlainProcess(config, device, batch) as plain:
        fast = [partial(milliseconds, function, device) for function in functions.values()]
        slow = [partial(plain.milliseconds, name) for name in functions]
        series = alternate(
            [timer for pair in zip(fast, slow, strict=True) for timer in pair], device
        )
    pairs = map(Pairs, series[::2], series[1::2])
    opaque = speed.compile or device.type != "cpu"
    shares = {} if opaque else time_shares(network, inputs)
    return dict(zip(functions, pairs, strict=True)), shares


class _PlainProcess:
    """Computes in the plain way in a process of its own, where nothing speeds up its memory."""

    def __init__(self, config: Config, device: torch.device, batch: int):
        with _environment("THP_MEM_ALLOC_ENABLE", "0"):  # see guided_diffusion/__init__.py
            self.pool = _fresh_process()
            self._ask(_prepare_plain, config, device, batch)

    def __enter__(self) -> "_PlainProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def milliseconds(self, name: str) -> float:
        return self._ask(_plain_milliseconds, name)

    def _ask(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process that computes in the plain way was ended by the system, most likely "
                "for lack of memory; lower --batch or, with method: latent, image_size"
            ) from error


_plain: dict[str, Callable[[], float]] = {}  # in that process: what measures each function


def _prepare_plain(config: Config, device: torch.device, batch: int) -> None:
    inputs = example(_unet_params(config), batch, device)
    network = plain_network(config, device)
    functions: Functions = {"evaluate": lambda: network(*inputs)}
    if config.latent:
        functions |= _coding(config, plain_coders(config, device), device)
    _plain.update({name: partial(milliseconds, f, device) for name, f in functions.items()})


@torch.no_grad()
def _plain_milliseconds(name: str) -> float:
    return _plain[name]()


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
    p = _unet_params(config)
    output = torch.zeros(batch, p.out_channels, p.image_size, p.image_size, device=device)
    denoiser = network_denoiser(lambda x, t: output, process)
    if config.latent:
        denoiser = ddim(denoiser, process, config.ddim_eta)
    times = plain_times(min(STEPS_FOR_SAMPLER, process.diffusion.num_timesteps))
    merges, channels = (False, p.out_channels) if config.latent else (True, 3)
    inpainter = PixelInpainter(
        denoiser, process.diffusion, times, p.image_size, inject_known=merges
    )
    image = torch.zeros(batch, channels, p.image_size, p.image_size)
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
    config: Config, settings: Sequence[str], model_path: str, batch: int
) -> FirstEvaluation:
    """Start a process that loads an inpainter and evaluates its network once."""
    # A JSON string is a YAML string too, whatever is in the path.
    settings = [*settings, f"model_path={json.dumps(model_path)}"]
    settings += ["classifier_scale=0"] if config.classifier else []
    with _fresh_process() as pool:
        started = time.time()
        try:
            return pool.submit(first_evaluation, config.source, settings, batch, started).result()
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
    """Inpaint a black image up to the first evaluation, and show the picture that it aims at.

    started: `time.time()`, of the process.
    """
    warnings.simplefilter("ignore")  # the parent has given the same warnings
    config = load_config(conf_path, settings, require_data=False)
    inpainter = factory.load_inpainter(conf_path, overrides=settings)
    what = "network" if config.latent else "denoiser"
    evaluate = getattr(inpainter, what)
    begun = ended = 0.0

    def watched(*arguments: Any) -> Any:
        nonlocal begun
        begun = time.time()
        return evaluate(*arguments)

    def stop(done: int, total: int, x0: torch.Tensor) -> None:
        nonlocal ended
        x0.flatten()[0].item()  # until it is asked for, a GPU is still at work
        ended = time.time()
        inpainter.as_pictures(x0, image.shape[2:])  # of latents, that takes memory too
        raise _Done

    side = picture_side(config)
    image = torch.full((batch, 3, side, side), -1.0)
    with contextlib.suppress(_Done):
        replace(inpainter, **{what: watched})(image, torch.zeros_like(image), progress=stop)
    return FirstEvaluation(begun - started, ended - begun, peak_memory(inpainter.diffusion.device))
