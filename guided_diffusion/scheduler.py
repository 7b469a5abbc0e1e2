"""The list of times that the sampler walks (RePaint, section 4.2, and its appendix).

Run by path it draws the list of the paper's setting, or of a config, or of several to compare:

    python guided_diffusion/scheduler.py --conf_path confs/face_example.yml --out schedule.png
    python guided_diffusion/scheduler.py --conf_path confs/demo.yml mine.yml --out compared.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.config import (
    Config,
    DiffusionConfig,
    LangevinConfig,
    ScheduleConfig,
    UserError,
    load_config,
)

PAPER_SCHEDULE = ScheduleConfig(t_T=250, n_sample=1, jump_length=10, jump_n_sample=10)


class _Jumps:
    """One level of jumps: how many are left at each time that is a multiple of its length.

    jump_length and jump_n_sample are the main level, jump2_ and jump3_ are shorter jumps within
    its own, and n_sample repeats single steps. Five steps of T, with one thing at a time:

    >>> plain = {"t_T": 5, "n_sample": 1, "jump_length": 1, "jump_n_sample": 1}
    >>> walk = lambda **keys: jump_times(ScheduleConfig(**plain | keys))
    >>> walk(jump_length=2, jump_n_sample=2)  # from 2 and from 0, up by 2 and down again, once
    [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]
    >>> walk(n_sample=2)  # each step from 2 on twice
    [4, 3, 2, 3, 2, 1, 2, 1, 0, 1, 0, -1]
    >>> walk(jump_length=2, jump_n_sample=2, jump2_n_sample=2, start_resampling=2)
    [4, 3, 2, 1, 2, 1, 0, 1, 0, 1, 2, 1, 2, 1, 0, 1, 0, -1]

    In the last one jump2 goes up by 1 from 1 and from 0, and once more after the main jump, which
    lets the shorter ones happen again; no jump leads above time 2.
    """

    def __init__(self, length: int, count: int, params: ScheduleConfig):
        self.length = length
        self.per_time = count - 1
        self.times = range(0, params.t_T - length, length)
        self.latest = params.start_resampling - length
        self.refill()

    def refill(self) -> None:
        self.left = dict.fromkeys(self.times, self.per_time)

    def use(self, t: int) -> bool:
        """Whether a jump starts at t; if so, it is spent."""
        if t > self.latest or self.left.get(t, 0) == 0:
            return False
        self.left[t] -= 1
        return True


def jump_times(params: ScheduleConfig) -> list[int]:
    """The times to walk, from t_T − 1 to −1.

    Each neighbouring pair is one transition: down is one evaluation of the network, up is one
    step of noise. The paper's setting has 2,410 evaluations and 2,160 re-noisings.
    """
    return list(_walk(params))


def plain_times(num_timesteps: int) -> list[int]:
    """Ancestral sampling without resampling: every time once."""
    return list(range(num_timesteps - 1, -2, -1))


def ddim_times(ddim_steps: int) -> tuple[list[int], list[int]]:
    """Latent diffusion's steps of DDIM, evenly spread over a base process of 1000 steps.

    ddim_steps: 1 to 1000; steps are 1000 // ddim_steps apart, so that 7 gives 8 of them, 334 gives
    500, and all from 501 on give 999.

    Returns the kept steps of the base process, ascending, and the times to walk. A time is an
    index of the kept steps, and each neighbouring pair is one evaluation of the network. The walk
    ends at time 0, base step 0, where a little noise is left: the published model decodes that.
    Source: Rombach et al. 2022, the published sampler.
    """
    stride = 1000 // ddim_steps
    # Its steps are those from 0 on, plus one; a step of 1000 is beyond the base process.
    evaluated = range(1, 1000, stride)
    return [0, *evaluated], list(range(len(evaluated), -1, -1))


def times_of(config: Config) -> list[int]:
    """What the sampler of a config walks."""
    if config.latent:
        return ddim_times(config.latent.ddim_steps)[1]
    if config.langevin:
        return [level.step for level in levels_of(config)]
    kept = config.diffusion.kept_steps
    times = jump_times(config.schedule) if config.schedule else plain_times(kept)
    return times_from(times, config.start_from.t) if config.start_from else times


def times_from(times: list[int], t: int) -> list[int]:
    """The part of a walk at or below time t: from t to −1.

    Where the walk goes above t and comes back, it stays at t instead, so that each neighbouring
    pair is one transition still; a jump that would end above t ends at t.
    """
    below = [time for time in times if time <= t]
    return [time for time, _ in groupby(below)]


def count_evaluations(times: list[int]) -> int:
    """Network evaluations that a list of times costs: one for each pair that does not go up."""
    return sum(u <= t for t, u in pairwise(times))


# ---- Levels of the quick sampler -------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A noise level, and the Langevin step that is taken where two neighbours are the same."""

    step: int  # t, of the base process; −1: the picture itself
    sigma: float  # of z, see `langevin`; 0 at step −1
    step_size: float = 0.0  # h: what is above x_0 shrinks by exp(−h)
    noise: float = 0.0  # standard deviation of what is added


PICTURE = Level(-1, 0.0)  # where a walk ends
DATA_STD = 0.4  # σ_d, of pixels in [-1, 1]


def levels_of(config: Config) -> list[Level]:
    """What the quick sampler of a config walks."""
    abar = _alphas_cumprod(config.diffusion)
    levels = langevin_levels(config.langevin, abar)
    if config.start_from:
        return [level for level in levels if level.step <= config.start_from.t]
    return levels


def describe_levels(config: Config) -> str:
    """How the quick sampler of a config splits its evaluations, in words."""
    levels = levels_of(config)[:-1]
    number = len(set(levels))
    sigmas = f"σ {levels[0].sigma:.3g} to {levels[-1].sigma:.2g}"
    steps = f"{len(levels) - number} Langevin steps between them"
    return f"sampler langevin: {number} noise levels ({sigmas}), {steps}"


def langevin_levels(params: LangevinConfig, alphas_cumprod: np.ndarray) -> list[Level]:
    """The levels to walk, from the noisiest to the picture; each pair is one evaluation.

    alphas_cumprod: ᾱ of the base process, (T,), all its steps. Unless `params.levels` says how
    many there are, as many as cost at most `params.evaluations`: they cost as many or one less,
    unless the process has too few steps. Levels with inner_from < σ < inner_to are there once more
    for each Langevin step.
    """
    sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    if params.levels:
        walk = _noise_walk(params, sigmas, params.levels)
    else:
        walks = (_noise_walk(params, sigmas, n) for n in range(2 * params.evaluations, 0, -1))
        walk = next(walk for walk in walks if len(walk) <= params.evaluations)
    return [*(_level(params, step, float(sigmas[step])) for step in walk), PICTURE]


def _noise_walk(params: LangevinConfig, sigmas: np.ndarray, number: int) -> list[int]:
    """The steps of so many levels, descending, as often as they are evaluated."""
    steps = _noise_steps(params, sigmas, number)
    inner = [step for step in steps if params.inner_from < sigmas[step] < params.inner_to]
    return sorted(steps + inner * params.inner_steps, reverse=True)


def _noise_steps(params: LangevinConfig, sigmas: np.ndarray, number: int) -> list[int]:
    """Steps of the base process whose σ are nearest to those of EDM (Karras et al. 2022, eq. 5)."""
    low, high = (sigma ** (1 / params.rho) for sigma in (params.sigma_min, params.sigma_max))
    wanted = np.linspace(low, high, number) ** params.rho
    between = np.sqrt(sigmas[:-1] * sigmas[1:])
    return np.unique(np.searchsorted(between, wanted)).tolist()


def _level(params: LangevinConfig, step: int, sigma: float) -> Level:
    """The level at this step, with a Langevin step that keeps the variance.

    It keeps it exactly where x_0 follows z with the slope c = σ_d² / (σ_d² + σ²), as of data whose
    pixels are independent. For c = 0 it is LanPaint's step, exact for a fixed x_0.
    """
    h = min(params.step_size, sigma)
    decay, slope = math.exp(-h), DATA_STD**2 / (DATA_STD**2 + sigma**2)
    noise = params.noise * sigma * math.sqrt(1 - decay**2 + slope * (1 - decay) ** 2)
    return Level(step, sigma, h, noise)


def _alphas_cumprod(diffusion: DiffusionConfig) -> np.ndarray:
    from guided_diffusion.gaussian_diffusion import beta_schedule  # with torch, which takes seconds

    return np.cumprod(1 - beta_schedule(diffusion.noise_schedule, diffusion.diffusion_steps))


# ---- Jumps -----------------------------------------------------------------------------------


def _walk(params: ScheduleConfig) -> Iterator[int]:
    main = _Jumps(params.jump_length, params.jump_n_sample, params)
    second = _Jumps(params.jump2_length, params.jump2_n_sample, params)
    third = _Jumps(params.jump3_length, params.jump3_n_sample, params)
    # A jump lets the shorter jumps below it happen again.
    levels = [(third, []), (second, [third]), (main, [second, third])]

    t = params.t_T
    while t >= 1:
        t -= 1
        yield t
        if t + 1 < params.t_T - 1 and t <= params.start_resampling:
            for _ in range(params.n_sample - 1):
                yield t + 1
                yield t
        for jumps, refilled in levels:
            if jumps.use(t):
                for shorter in refilled:
                    shorter.refill()
                yield from range(t + 1, t + jumps.length + 1)
                t += jumps.length
    yield -1


# ---- Drawn -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the schedule of times of a config.")
    parser.add_argument(
        "--conf_path",
        nargs="+",
        default=[],
        metavar="CONF",
        help="a config, or several to compare; without it, the paper's setting",
    )
    parser.add_argument("--out", default="schedule.png", help="the picture (schedule.png)")
    arguments = parser.parse_args()
    try:
        _draw(arguments.conf_path, arguments.out)
    except UserError as error:
        sys.exit(_fail(error))


def _draw(conf_paths: list[str], out: str) -> None:
    from guided_diffusion.output import schedule_plot  # for this command alone

    if not out.lower().endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--out {out}: accepted: a PNG, PDF or SVG file, such as schedule.png")
    schedules = schedules_of(conf_paths)
    if len(schedules) == 1:
        ((name, times),) = schedules.items()
        title = f"{name}: {_costs(times)}"
        print(_costs(times))
    else:
        title = "Schedules of times"
        schedules = {f"{name}: {_costs(times)}": times for name, times in schedules.items()}
        print(*schedules, sep="\n")
    schedule_plot.save_figure(schedule_plot.schedule_figure(schedules, title), out)
    print(f"written: {out}")


def schedules_of(conf_paths: list[str]) -> dict[str, list[int]]:
    """The times of each config, by what tells it from the others; of none, the paper's setting.

    Raises UserError.
    """
    if not conf_paths:
        return {"RePaint, paper setting": jump_times(PAPER_SCHEDULE)}
    configs = {path: load_config(path, require_data=False) for path in conf_paths}
    if len(configs) == 1:
        return {path: times_of(config) for path, config in configs.items()}
    uses = Counter(config.name for config in configs.values())
    return {
        config.name if uses[config.name] == 1 else f"{config.name} ({path})": times_of(config)
        for path, config in configs.items()
    }


def _costs(times: list[int]) -> str:
    evaluations = count_evaluations(times)
    ups = len(times) - 1 - evaluations
    return f"{evaluations:,} evaluations, {ups:,} re-noising steps an image"


def _fail(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
