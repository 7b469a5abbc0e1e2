"""How fast a config's network is on this machine, beside the plain way and beside the ceiling.

The plain way is the original's: eager, fp32, NCHW, attention by explicit softmax.
"""

import math
import os
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
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
from guided_diffusion.benchmark import setup
from guided_diffusion.benchmark.setup import channels_last, digits, network_inputs
from guided_diffusion.config import Config, UserError
from guided_diffusion.machine.memory import ran_out
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.networks.strips import Whole
from guided_diffusion.networks.unet import UNet
from guided_diffusion.scheduler import count_evaluations
from guided_diffusion.speed.choice import Speed

SECONDS_FOR_PAIRS = 90  # for as many as fit; a large network on two cores takes 5 to 20 s for one
LEAST_PAIRS, MOST_PAIRS = 3, 50

LARGEST = 6  # convolutions of the network that the ceiling is looked for among
CEILING_RUNS = 5  # of each, the best one counts
GPU_MATRIX = 8192  # side of a matrix product that keeps any GPU busy

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # ours have them, see guided_diffusion/__init__.py

# By name: "evaluate" and, with latent diffusion, "encode" and "decode"; each of one batch.
Functions = dict[str, Callable[[], torch.Tensor]]
Times = Mapping[str, list[float]]  # of each call, in milliseconds
Ceiling = tuple[float, str]  # the most TFLOP/s that this machine does, and with what


def measure(config: Config, batch: int) -> dict[str, Any]:
    """The figures of a config's denoising network, with random weights, as one JSON object.

    Takes up to five minutes. Of latent diffusion, the autoencoder is measured too, and
    `image_size` decides of what size. Notes of progress go to stderr. Raises UserError for what
    the machine cannot do, or has no room for.
    """
    device = factory.pick_device(config.device)
    speed = factory.choose_speed(replace(config, classifier=None), device)
    evaluations = count_evaluations(factory.build_times(config))
    networks = setup.networks_of(config)
    unet, *_ = networks.values()
    operations = count_operations(unet, batch)
    with setup.random_checkpoint(networks) as path:
        here = replace(config, model_path=path)
        times, plain_times, peak, (ceiling, operation) = compare(here, device, batch, speed, unet)
    fast = _figures(times, batch, evaluations, operations)
    plain = _figures(plain_times, batch, evaluations, operations)
    return {
        "name": config.name,
        "machine": setup.describe_machine(device),
        "device": str(device),
        "precision": speed.precision,
        "speed": speed.describe(),
        "batch": batch,
        "image_size": setup.picture_side(config),
        "weights": sum(weight.numel() for weight in unet.parameters()),
        "guided": config.classifier is not None,
        "evaluations_per_image": evaluations,
        "tflop_per_evaluation": operations / 1e12,
        "runs": len(times["evaluate"]),
        **fast,
        **{f"plain_{key}": figure for key, figure in plain.items()},
        "ratio_to_plain": plain["ms_per_evaluation"] / fast["ms_per_evaluation"],
        "ceiling_tflops": ceiling,
        "ceiling_operation": operation,
        "share_of_ceiling": fast["tflops"] / ceiling,
        "peak_memory_bytes": peak,
    }


def _figures(times: Times, batch: int, evaluations: int, operations: int) -> dict[str, Any]:
    """What follows from the times of one way."""
    ms = statistics.median(times["evaluate"])
    coding = {
        f"{name}_ms": statistics.median(each) / batch  # of one image
        for name, each in times.items()
        if name != "evaluate"
    }
    return {
        "ms_per_evaluation": ms,
        "ms_spread": [min(times["evaluate"]), max(times["evaluate"])],
        **coding,
        "images_per_hour": 3_600_000 / (ms * evaluations / batch + sum(coding.values())),
        "tflops": operations / ms / 1e9,
    }


def describe(f: Mapping[str, Any]) -> str:
    """What `measure` found, as a table for people."""

    def row(label: str, key: str, choose: Callable[[Any], float] = float) -> tuple[str, ...]:
        return label, *(digits(choose(f[name])) for name in (key, f"plain_{key}"))

    side, peak = f["image_size"], f["peak_memory_bytes"]
    coding = [name for name in ("encode", "decode") if f"{name}_ms" in f]
    head = [
        f"{f['name']}: network for {side}×{side} images, {f['weights'] / 1e6:.1f} M weights, "
        f"{digits(f['tflop_per_evaluation'])} TFLOP an evaluation of batch {f['batch']}",
        f"machine: {f['machine']}; device {f['device']}",
        f"measured: {f['speed']}",
    ]
    rows = [
        ("", "measured", "plain"),
        row("milliseconds an evaluation, median", "ms_per_evaluation"),
        row("    fastest", "ms_spread", min),
        row("    slowest", "ms_spread", max),
        *(row(f"milliseconds to {name} an image, median", f"{name}_ms") for name in coding),
        row(f"images per hour, at {f['evaluations_per_image']:,} evaluations", "images_per_hour"),
        row("TFLOP/s", "tflops"),
        (f"    ceiling in {f['precision']}", digits(f["ceiling_tflops"]), ""),
        ("    share of it", f"{f['share_of_ceiling']:.0%}", ""),
        ("peak memory, GB", "unknown" if peak is None else digits(peak / 1e9), ""),
        ("times as fast as plain", digits(f["ratio_to_plain"]), "1"),
    ]
    notes = [
        "plain: eager, fp32, NCHW, attention by explicit softmax, as the original runs. Each way "
        f"has a process of its own. Both were evaluated {f['runs']} times, in turns.",
        "TFLOP: a multiply-add counts as two, and a convolution as its plain sum of products. "
        "Winograd's need fewer, so that the share of the ceiling may exceed 100 %.",
        f"ceiling: {f['ceiling_operation']}, the best of this network's large convolutions and of "
        "matrix products.",
    ]
    if coding:
        notes += [
            "An evaluation is the U-Net's alone. The autoencoder's time counts in images per hour, "
            "and its memory in peak memory."
        ]
    if f["guided"]:
        notes += ["The classifier that guides this config's sampling is not counted."]
    return setup.page(head, rows, notes)


def count_operations(network: UNet, batch: int) -> int:
    """Of one evaluation, without the additions of norms and activations; a multiply-add is two.

    network: on the meta device.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(*network_inputs(network.params, batch, "meta"))
    return counter.get_total_flops()


# ---- Both ways, each in a process of its own -------------------------------------------------


def compare(
    config: Config, device: torch.device, batch: int, speed: Speed, unet: UNet
) -> tuple[Times, Times, int | None, Ceiling]:
    """Compute as a run does, with the config's checkpoint, and in the plain way, in turns.

    unet: of the config, on the meta device. Returns the times of both, and of the first process
    the bytes that it held at most (None: this system does not tell) and its ceiling.
    """
    setup.note("computing in turns with the plain way, for up to three minutes")
    with fresh_process() as fast, fresh_process() as plain:
        names = fast(_prepare, fast_functions, config, device, batch, speed)
        os.environ[HUGE_PAGES], before = "0", os.environ[HUGE_PAGES]
        try:
            plain(_prepare, plain_functions, config, device, batch)
        finally:
            os.environ[HUGE_PAGES] = before
        timers = [partial(ask, _time, name, device) for name in names for ask in (fast, plain)]
        series = alternate(timers, device)
        peak = fast(setup.peak_memory, device)
        setup.note("looking for the ceiling")
        ceiling = fast(measure_ceiling, largest_convolutions(unet, batch), speed, device)
    times, plain_times = (dict(zip(names, series[i::2], strict=True)) for i in (0, 1))
    return times, plain_times, peak, ceiling


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """What calls a function in a process of its own, which starts at the first call."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin) as pool:

        def ask(function: Callable[..., Any], *arguments: object) -> Any:
            try:
                return pool.submit(function, *arguments).result()
            except Exception as error:
                if not (isinstance(error, BrokenProcessPool) or ran_out(error)):
                    raise
                raise UserError(
                    "not enough memory to compute this, or the system ended the process that "
                    "did; lower --batch or, with method: latent, image_size"
                ) from error

        yield ask


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says that it was stopped
    warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)


_functions: Functions = {}  # in a fresh process: what is measured there


def _prepare(build: Callable[..., Functions], *arguments: object) -> list[str]:
    _functions.update(build(*arguments))
    return list(_functions)


@torch.no_grad()
def _time(name: str, device: torch.device) -> float:
    return milliseconds(_functions[name], device)


def fast_functions(config: Config, device: torch.device, batch: int, speed: Speed) -> Functions:
    """What a run of the config computes, with the weights of its checkpoint."""
    unet, *_ = setup.networks_of(config).values()
    inputs = network_inputs(unet.params, batch, device)
    networks = factory.load_networks(replace(config, classifier=None), device, speed)
    functions: Functions = {"evaluate": partial(networks["denoiser"], *map(channels_last, inputs))}
    if autoencoder := networks.get("autoencoder"):
        x, z = map(channels_last, setup.coder_inputs(config, batch, device))
        functions["encode"] = partial(autoencoder.encode, x)
        functions["decode"] = partial(autoencoder.decode, z)
    return functions


def plain_functions(config: Config, device: torch.device, batch: int) -> Functions:
    """The same in the plain way, pictures as a whole; weights as in `random_checkpoint`."""
    allow_tf32(False)
    unet, *autoencoders = setup.networks_of(config).values()
    functions: Functions = {"evaluate": partial(unet, *network_inputs(unet.params, batch, device))}
    for autoencoder in autoencoders:
        functions |= _plain_coders(autoencoder, *setup.coder_inputs(config, batch, device))
    for network in (unet, *autoencoders):
        network.load_state_dict(setup.random_weights(network), assign=True)
        network.to(device).eval()
    plainly = sdpa_kernel(SDPBackend.MATH)  # a decorator, too
    return {name: plainly(function) for name, function in functions.items()}


def _plain_coders(coder: Autoencoder, x: torch.Tensor, z: torch.Tensor) -> Functions:
    def decode() -> torch.Tensor:
        codes = coder.post_quant_conv(coder.quantize(z).contiguous())
        return coder.decoder(Whole(codes)).tensor

    return {"encode": lambda: coder.quant_conv(coder.encoder(Whole(x)).tensor), "decode": decode}


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may cut the factors of fp32 products to 11 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


# ---- Time ------------------------------------------------------------------------------------


def alternate(timers: Sequence[Callable[[], float]], device: torch.device) -> list[list[float]]:
    """What each timer says, called in turns after a warm-up; as often as time allows."""
    for _ in range(3 if device.type == "cuda" else 1):
        for timer in timers:
            timer()
    rounds, end = [], time.monotonic() + SECONDS_FOR_PAIRS
    while len(rounds) < LEAST_PAIRS or (len(rounds) < MOST_PAIRS and time.monotonic() < end):
        rounds.append([timer() for timer in timers])
    return [list(times) for times in zip(*rounds, strict=True)]


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call, up to the end of what it asked of the device."""
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - begun) * 1000


# ---- The ceiling -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A 3×3 convolution or a product of two matrices, by the shapes of what it takes."""

    x: tuple[int, ...]  # (B, C, side, side) or (rows, C)
    weight: tuple[int, ...]  # (out, C, 3, 3) or (out, C)

    @property
    def operations(self) -> int:
        return 2 * math.prod(self.x) * math.prod(self.weight) // self.x[1]

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
        """What computes it, of random numbers; images are in channels_last."""
        numbers = (torch.randn(shape, device=device).to(dtype) for shape in (self.x, self.weight))
        x, weight = map(channels_last, numbers)
        convolve = partial(F.conv2d, padding=1)
        return partial(convolve if x.dim() == 4 else F.linear, x, weight)

    def __str__(self) -> str:
        (n, channels, *sides), out = self.x, self.weight[0]
        if not sides:
            return f"product of {n}×{channels} and {channels}×{out} matrices"
        return (
            f"3×3 convolution of {channels} to {out} channels at {sides[0]}×{sides[1]}, batch {n}"
        )


@torch.no_grad()
def measure_ceiling(convolutions: Sequence[Product], speed: Speed, device: torch.device) -> Ceiling:
    """The best of these convolutions, and of the matrix products that they are made of."""
    matrices = [Product((c.x[0] * c.x[2] * c.x[3], c.x[1]), c.weight[:2]) for c in convolutions]
    if device.type == "cuda":
        matrices.append(Product((GPU_MATRIX, GPU_MATRIX), (GPU_MATRIX, GPU_MATRIX)))
    allow_tf32(speed.precision == "tf32")
    return max(_try(product, speed.dtype, device) for product in (*convolutions, *matrices))


def largest_convolutions(network: UNet, batch: int) -> list[Product]:
    """Those of 3×3 that most of the network's operations go into; network: on the meta device."""
    work: Counter[Product] = Counter()

    def add(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            product = Product(tuple(inputs[0].shape), tuple(conv.weight.shape))
            work[product] += product.operations

    hooks = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network(*network_inputs(network.params, batch, "meta"))
    for hook in hooks:
        hook.remove()
    return [product for product, _ in work.most_common(LARGEST)]


def _try(product: Product, dtype: torch.dtype, device: torch.device) -> Ceiling:
    function = product.prepare(dtype, device)
    milliseconds(function, device)
    best = min(milliseconds(function, device) for _ in range(CEILING_RUNS))
    return product.operations / best / 1e9, str(product)
