"""What every measurement takes: a network of random weights, its input, and words for figures."""

import contextlib
import math
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from guided_diffusion.checkpoints.loading import Part
from guided_diffusion.config import Config, UserError
from guided_diffusion.machine import storage
from guided_diffusion.networks.unet import UNetParams

WIDTH = 88  # of the notes below a table, in characters


@contextlib.contextmanager
def random_checkpoint(networks: Mapping[Part | None, nn.Module]) -> Iterator[str]:
    """The path of a checkpoint of random weights, which is there as long as the context lasts.

    networks: by what they are of a latent diffusion checkpoint; None: the file's only one.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        path = os.path.join(folder, "random.pt")
        sizes = (weight.nbytes for each in networks.values() for weight in each.parameters())
        gigabytes = sum(sizes) / 1e9
        note(f"writing {digits(gigabytes)} GB of random weights to {folder}")
        weights = {
            part.stored_name(key) if part else key: weight
            for part, network in networks.items()
            for key, weight in random_weights(network).items()
        }
        with storage.writing(
            f"{digits(gigabytes)} GB of random weights to {folder}",
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


def example(p: UNetParams, batch: int, device: torch.device | str) -> list[torch.Tensor]:
    """What a network takes: noise, times and, if it is class-conditional, classes."""
    noise = torch.randn(batch, p.in_channels, p.image_size, p.image_size, device=device)
    times = torch.full((batch,), 500.0, device=device)
    if p.num_classes is None:
        return [noise, times]
    return [noise, times, torch.zeros(batch, dtype=torch.long, device=device)]


def picture_side(config: Config) -> int:
    """The side of the pictures that a config is measured with: of the size that it was made for."""
    if config.latent is None:
        return config.network.image_size
    return config.image_size or config.latent.nominal_size


@contextlib.contextmanager
def room_on_gpu(batch: int) -> Iterator[None]:
    """Turn a GPU's lack of memory for batches of this size into a UserError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has not enough memory for --batch {batch}; lower it, or --set device=cpu"
        ) from error


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


def describe_machine(device: torch.device, cores: int) -> str:
    """GPU or CPU, cores in use, torch."""
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    of_all = f"{cores} of {os.cpu_count()} cores"
    return ", ".join([*gpu, _cpu_name(), of_all, f"torch {torch.__version__}"])


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
    """Lines, a table and notes below it, for people."""
    filled = (textwrap.fill(text, WIDTH, subsequent_indent="    ") for text in notes)
    return "\n".join([*head, "", *_table(rows), "", *filled])


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns side by side, the first one to the left, numbers to the right."""
    label, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(label), *map(str.rjust, row[1:], numbers)]).rstrip() for row in rows
    ]


def note(text: str) -> None:
    """Say what is going on, beside what is asked for."""
    print(f"{text} ...", file=sys.stderr, flush=True)
