"""How far a run has come: one bar over all evaluations, and an early word on what is left."""

import time
import warnings

import torch
from tqdm import tqdm


class ProgressReport:
    """Shows evaluations, one for each image of a batch; the context in which a run works."""

    warm_up = 1  # calls of the network that are not timed: the first is always slow
    timed = 4  # calls that the estimate is made from
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"

    def __init__(self, images: int, evaluations: int, show_bar: bool):
        """evaluations: for each image."""
        self.images = images
        self.total = images * evaluations
        self.show_bar = show_bar
        self.done = 0
        self.batch_size = self.batch_calls = 0  # a call is one evaluation of the whole batch
        self.calls = 0  # since the clock was started
        self.timed_from = (0.0, 0)  # (seconds, evaluations done)

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
        self.batch_size, self.batch_calls = batch_size, 0
        first, last = images_before + 1, images_before + batch_size
        images = f"{first}" if first == last else f"{first}-{last}"
        self.bar.set_description(f"image {images} of {self.images}")

    def take_back_batch(self, why: str) -> None:
        """Warn, count the batch as not begun, and estimate anew what others will take."""
        with tqdm.external_write_mode():
            warnings.warn(why, UserWarning, stacklevel=2)
        self._count(-self.batch_calls)
        self.batch_calls = self.calls = 0

    def evaluation_done(self, done: int, total: int, pred_x0: torch.Tensor) -> None:
        """An `inpainter.Progress` of the batch."""
        self.batch_calls = done
        self._count(1)
        self.calls += 1
        if self.calls == self.warm_up:
            self.timed_from = (_now(pred_x0), self.done)
        elif self.calls == self.warm_up + self.timed and self.done < self.total:
            self._announce(_now(pred_x0))

    def _count(self, calls: int) -> None:
        self.done += calls * self.batch_size
        self.bar.update(calls * self.batch_size)

    def _announce(self, now: float) -> None:
        start, done_before = self.timed_from
        seconds = (now - start) / (self.done - done_before)
        left = _duration(seconds * (self.total - self.done))
        with tqdm.external_write_mode():
            print(f"about {left} left ({_duration(seconds)} per evaluation)", flush=True)


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
