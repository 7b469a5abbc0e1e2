"""Schedules of times, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from guided_diffusion.config import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS, STYLES = 10, ("-", "--", ":", "-.")  # C0 to C9 are ten distinct colours of matplotlib


def schedule_figure(schedules: Mapping[str, list[int]], title: str) -> Figure:
    """A plot of times against transitions; of several schedules, with their names in a legend.

    schedules: times by name. Raises UserError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from error
    several = len(schedules) > 1
    figure = Figure(figsize=(9, 4 + 0.25 * len(schedules) * several), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, times) in enumerate(schedules.items()):
        style = STYLES[i // COLOURS % len(STYLES)]
        axes.plot(times, linewidth=0.8, color=f"C{i % COLOURS}", linestyle=style, label=name)
    longest = max(map(len, schedules.values()))
    axes.set(title=title, xlabel="transition", ylabel="time t", xlim=(0, longest - 1))
    axes.margins(x=0)
    if several:  # below the axes, where it hides nothing
        legend = figure.legend(loc="outside lower left")
        for line in legend.get_lines():
            line.set_linewidth(3)
    return figure


def save_figure(figure: Figure, out: str) -> None:
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the plot to {out}: {reason}") from error
