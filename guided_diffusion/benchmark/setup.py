"""What every measurement takes: networks of random weights, their inputs, and words for figures."""

import contextlib
import math
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from guided_diffusion import factory
from guided_diffusion.checkpoints.loading import Part
from guided_diffusion.config import Config
from guided_diffusion.machine import storage
from guided_diffusion.networks.params import UNetParams

WIDTH = 88  # of the notes below a table, in characters


def networks_of(config: Config) -> dict[Part | None, nn.Module]:
    """The networks of a config on the meta device, the U-Net first; see `random_checkpoint`."""
    blanks = factory.build_networks(replace(config, classifier=None)).values()
    return {blank.part: blank.network for blank in blanks}


@contextlib.contextmanager
def random_checkpoint(networks: Mapping[Part | None, nn.Module]) -> Iterator[str]:
    """The path of a checkpoint of random weights, which is there as long as the context lasts.

    networks: by what they are of a latent diffusion checkpoint; None: the file's only one.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        path = os.path.join(folder, "random.pt")
        weights = {
            part.stored_name(key) if part else key: weight
            for part, network in networks.items()
            for key, weight in random_weights(network).items()
        }
        size = f"{digits(sum(weight.nbytes for weight in weights.values()) / 1e9)} GB"
        note(f"writing {size} of random weights to {folder}")
        with storage.writing(
            f"{size} of random weights to {folder}",
            "set the environment variable TMPDIR to a folder with room for them",
            errors=(OSError, RuntimeError),  # torch's own, where the disk is full
        ):
            torch.save(weights, path)
        del weights  # gigabytes, while others are measured
        yield path


def random_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict that keeps activations near unit variance, with nothing left at zero."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, weight in network.state_dict().items():
        values = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            values /= math.prod(weight.shape[1:]) ** 0.5
        else:  # biases, and the scales of the norms
            values = values.mul_(0.1).add_(key.endswith("weight"))
        weights[key] = values
    return weights


def network_inputs(p: UNetParams, batch: int, device: torch.device | str) -> list[torch.Tensor]:
    """What a network takes: noise, times and, if it is class-conditional, classes."""
    noise = torch.randn(batch, p.in_channels, p.image_size, p.image_size, device=device)
    times = torch.full((batch,), 500.0, device=device)
    if p.num_classes is None:
        return [noise, times]
    return [noise, times, torch.zeros(batch, dtype=torch.long, device=device)]


def coder_inputs(config: Config, batch: int, device: torch.device) -> list[torch.Tensor]:
    """What a latent config's autoencoder encodes, and what it decodes."""
    p, side = config.latent.autoencoder.params, config.latent.nominal_size
    pictures = torch.rand(batch, p.in_channels, side, side, device=device) * 2 - 1
    latents = torch.randn(batch, p.embed_dim, side // p.factor, side // p.factor, device=device)
    return [pictures, latents]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, in this order if they are images or weights of a convolution."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def picture_side(config: Config) -> int:
    """The side of the pictures that a config is measured with: of the size that it was made for."""
    if config.latent is None:
        return config.network.image_size
    return config.image_size or config.latent.nominal_size


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most: on a GPU of CUDA those there, else in memory.

    None: this system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss counts what the parent held, see `man getrusage`
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "darwin":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


# ---- Words -----------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> str:
    """GPU or CPU, cores in use, torch."""
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return ", ".join([*gpu, _cpu_name(), cores, f"torch {torch.__version__}"])


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def digits(number: float) -> str:
    """Three significant digits, or all of those before the point."""
    places = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:,.{max(0, places)}f}"


def page(head: Sequence[str], rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> str:
    """Lines, a table with numbers to the right, and notes below it, for people."""
    label, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
    table = ("  ".join([r[0].ljust(label), *map(str.rjust, r[1:], numbers)]) for r in rows)
    filled = (textwrap.fill(text, WIDTH, subsequent_indent="    ") for text in notes)
    return "\n".join([*head, "", *map(str.rstrip, table), "", *filled])


def note(text: str) -> None:
    """Say what is going on, beside what is asked for."""
    print(f"{text} ...", file=sys.stderr, flush=True)
