"""Which steps of the base process are kept (Nichol & Dhariwal 2021, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion


@dataclass(frozen=True)
class Process:
    """A respaced diffusion, and the time that the network is told at each of its steps."""

    diffusion: GaussianDiffusion
    network_times: torch.Tensor  # (N,) float32 on the diffusion's device: steps of the base process


def respaced_process(
    betas: np.ndarray,
    respacing: str = "",
    *,
    rescale_timesteps: bool = False,
    device: torch.device | str = "cpu",
) -> Process:
    """The process that visits some of the steps of the base process with these betas.

    respacing: see `space_timesteps`. rescale_timesteps: the network counts as if the base process
    had 1000 steps. Raises ValueError where the respacing does not fit.
    """
    scale = 1000 / len(betas) if rescale_timesteps else 1.0
    return process_of_steps(betas, space_timesteps(len(betas), respacing), scale, device)


def process_of_steps(
    betas: np.ndarray,
    steps: Sequence[int],
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Process:
    """The process that visits these steps alone, ascending; the network is told step · scale."""
    times = torch.tensor([step * scale for step in steps], dtype=torch.float32, device=device)
    return Process(GaussianDiffusion(respace_betas(betas, steps), device), times)


def space_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """The kept steps of a process of num_timesteps, ascending.

    respacing: "" keeps all; "n1,n2,…" splits the process into as many equal sections as there
    are numbers (the first ones one step longer, where it does not divide) and spreads n_i steps
    over each; "ddimN" takes every i-th step, for the first i that gives exactly N.
    Raises ValueError if there are not enough steps, or no such i.
    """
    if not respacing:
        return list(range(num_timesteps))
    if respacing.startswith("ddim"):
        return _every_ith(num_timesteps, int(respacing[len("ddim") :]))
    counts = [int(count) for count in respacing.split(",")]
    size, longer = divmod(num_timesteps, len(counts))
    steps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        section_size = size + (section < longer)
        steps += _spread(start, section_size, count)
        start += section_size
    return steps


def respace_betas(betas: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """The β of a process that visits these steps alone, so that ᾱ at each stays what it was."""
    alphas_cumprod = np.cumprod(1 - betas)[[*steps]]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def _every_ith(num_timesteps: int, count: int) -> list[int]:
    for i in range(1, num_timesteps + 1):
        steps = range(0, num_timesteps, i)
        if len(steps) == count:
            return list(steps)
    raise ValueError(f"no whole stride takes exactly {count} of {num_timesteps} steps")


def _spread(start: int, size: int, count: int) -> list[int]:
    if count > size:
        raise ValueError(f"cannot take {count} steps from a section of {size}")
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    steps, offset = [], 0.0
    for _ in range(count):
        steps.append(start + round(offset))
        offset += stride  # repeated addition, not k·stride: the published steps were made so
    return steps
