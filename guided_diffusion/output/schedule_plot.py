"""Schedules of times, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from guided_diffusion.config import UserError
from guided_diffusion.machine import storage

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
    """Raises UserError where that is impossible, or the kind of file is not known."""
    with storage.writing(f"the plot to {out}", errors=(OSError, ValueError)):
        figure.savefig(out, dpi=150)
