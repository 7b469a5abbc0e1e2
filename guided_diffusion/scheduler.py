"""The list of times that the sampler walks (RePaint, section 4.2, and its appendix).

Run by path it draws the list of the paper's setting, or of a config:

    python guided_diffusion/scheduler.py --conf_path confs/face_example.yml --out schedule.png
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.config import ScheduleConfig, UserError, load_config

PAPER_SCHEDULE = ScheduleConfig(t_T=250, n_sample=1, jump_length=10, jump_n_sample=10)


class _Jumps:
    """One level of jumps: how many are left at each time that is a multiple of its length."""

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


def count_evaluations(times: list[int]) -> int:
    """Network evaluations that a list of times costs."""
    return sum(u < t for t, u in pairwise(times))


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


def draw_schedule(times: list[int], title: str, out: str) -> None:
    """Write a plot of the times against the transitions. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(times, linewidth=0.8)
    axes.set(title=title, xlabel="transition", ylabel="time t", xlim=(0, len(times) - 1))
    axes.margins(x=0)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the plot to {out}: {reason}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the schedule of times of a config.")
    parser.add_argument("--conf_path", help="a config; without it, the paper's setting")
    parser.add_argument("--out", default="schedule.png", help="the picture (schedule.png)")
    arguments = parser.parse_args()
    try:
        _draw(arguments.conf_path, arguments.out)
    except UserError as error:
        sys.exit(_fail(error))


def _draw(conf_path: str | None, out: str) -> None:
    schedule = PAPER_SCHEDULE
    if conf_path:
        schedule = load_config(conf_path, require_data=False).schedule
    if schedule is None:
        raise UserError(f"{conf_path}: has no schedule_jump_params, so there is nothing to draw")
    times = jump_times(schedule)
    evaluations = count_evaluations(times)
    ups = len(times) - 1 - evaluations
    summary = f"{evaluations:,} evaluations, {ups:,} re-noising steps an image"
    print(summary)
    draw_schedule(times, f"{conf_path or 'RePaint, paper setting'}: {summary}", out)
    print(f"written: {out}")


def _fail(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
