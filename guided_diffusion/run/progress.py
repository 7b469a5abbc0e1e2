"""How far a run has come: one bar over all evaluations, and an early word on what is left."""

import time
import warnings

import torch
from tqdm import tqdm

from guided_diffusion.machine.ranks import Team


class ProgressReport:
    """Shows evaluations, one for each image of a batch; the context in which a run works.

    Of several ranks, the first shows what all of them have done.
    """

    warm_up = 1  # calls of the network that are not timed: the first is always slow
    timed = 4  # calls that the estimate is made from
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"

    def __init__(self, images: int, total: int, show_bar: bool, team: Team):
        """total: evaluations of the network for all images."""
        self.images = images
        self.total = total
        self.show_bar = show_bar and team.is_first
        self.team = team
        self.tally = team.tally("evaluations")
        self.done = 0  # by all ranks
        self.own = 0  # by this one
        self.batch_done = 0  # of this one's batch
        self.views = self.view_calls = 0  # a call is one evaluation of so many views
        self.calls = 0  # since the clock was started
        self.timed_from = (0.0, 0)  # (seconds, own evaluations done)

    def __enter__(self) -> "ProgressReport":
        self.bar = tqdm(
            total=self.total,
            unit=" evaluations",
            disable=not self.show_bar,
            bar_format=self.bar_format,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def start_batch(self, images_before: int, batch_size: int) -> None:
        self.batch_done = 0
        self.start_views(batch_size)
        first, last = images_before + 1, images_before + batch_size
        images = f"{first}" if first == last else f"{first}-{last}"
        self.bar.set_description(f"image {images} of {self.images}")

    def start_views(self, number: int) -> None:
        """From here, calls are of so many views: the batch's images, or one region of each."""
        self.views, self.view_calls = number, 0

    def skip(self, calls: int) -> None:
        """Count calls for these views that an earlier run has done."""
        self.view_calls += calls
        self._count(calls * self.views)

    def take_back_batch(self, why: str) -> None:
        """Warn, count the batch as not begun, and estimate anew what others will take."""
        with tqdm.external_write_mode():
            warnings.warn(why, UserWarning, stacklevel=2)
        self._count(-self.batch_done)
        self.calls = 0

    def evaluation_done(self, pred_x0: torch.Tensor) -> None:
        """pred_x0: the result of this evaluation of the views."""
        self.view_calls += 1
        self.own += self.views
        self._count(self.views)
        self.calls += 1
        if self.calls == self.warm_up:
            self.timed_from = (_now(pred_x0), self.own)
        elif self.calls == self.warm_up + self.timed and self.team.is_first:
            self._announce(_now(pred_x0))

    def tell(self) -> None:
        """Let other ranks know what this one has done, and show what they have."""
        self._show(self.tally.tell())

    def _count(self, evaluations: int) -> None:
        self.batch_done += evaluations
        self._show(self.tally.add(evaluations))

    def _show(self, done: int) -> None:
        self.bar.update(done - self.done)
        self.done = done

    def _announce(self, now: float) -> None:
        if self.done >= self.total:
            return
        start, own_before = self.timed_from
        seconds = (now - start) / (self.own - own_before)  # at which the other ranks work too
        left = _duration(seconds * (self.total - self.done) / self.team.world.size)
        line = f"about {left} left ({_duration(seconds)} per evaluation)"
        with tqdm.external_write_mode():
            self.team.world.say(line)


def _now(pred_x0: torch.Tensor) -> float:
    """The time at which this tensor is there; until it is asked for, a GPU is still at work."""
    pred_x0[0, 0, 0, 0].item()
    return time.monotonic()


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
