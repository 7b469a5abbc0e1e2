"""One rank of a run: its batches, from files to results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from guided_diffusion.config import Config, DatasetConfig, UserError
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.images.files import encode_png
from guided_diffusion.images.pairs import read_pair
from guided_diffusion.images.tensors import to_bytes
from guided_diffusion.images.views import Picture, View, decode_pair
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.machine import memory, storage
from guided_diffusion.machine.signals import Interrupted, StopSignals
from guided_diffusion.run.plan import Job, Plan, Task, stream_of_view
from guided_diffusion.run.progress import ProgressReport
from guided_diffusion.run.records import Result, load_state, save_state, writing
from guided_diffusion.speed.choice import DTYPES, Speed, offered_precisions
from guided_diffusion.streams import Evaluation, SamplerState

if TYPE_CHECKING:
    from guided_diffusion.output.film import FilmLog

POLLING = 0.5  # seconds between two looks at what other ranks do
STALLED = 30 * 60  # seconds without an evaluation, after which another rank counts as lost


@dataclass(frozen=True)
class TaskView:
    """One view of a task's picture."""

    task: Task
    number: int  # among the picture's views
    view: View

    @property
    def stream(self) -> int:
        return stream_of_view(self.task.origin.stream, self.number)

    @property
    def film_name(self) -> str:
        return self.task.film_names[self.number]


@dataclass
class ViewBatch:
    """What the network sees at a time: the first views of some pictures, or the second ones, …"""

    views: list[TaskView]
    state_path: str  # where the sampler's state goes
    results: np.ndarray | None = None  # uint8 (B, H, W, 3); None: memory does not suffice for it


@dataclass
class Worker:
    """One rank at work."""

    job: Job
    inpainter: Inpainter
    report: ProgressReport
    stop: StopSignals
    film: FilmLog | None  # None: nothing is shown of sampling
    most: int  # images at a time that memory suffices for, as far as is known

    @property
    def plan(self) -> Plan:
        return self.job.plan

    def batches(self) -> Iterator[ViewBatch]:
        """What this rank has to sample. It takes the results of one when asked for the next.

        On rank 0 it ends when all ranks are done.
        """
        batches, team = self.plan.batches, self.job.team
        before = [0, *accumulate(map(len, batches))]
        # Handed out one by one, so that nobody waits for a slow rank.
        while (number := team.add("batches begun", 1) - 1) < len(batches):
            yield from self._work_on(batches[number], before[number])
            self.report.tell()
            team.add("batches done", 1)
        if team.is_first:
            self._await_others()

    def _work_on(self, batch: Sequence[Task], before: int) -> Iterator[ViewBatch]:
        done = 0
        while done < len(batch):
            tasks = batch[done : done + self.most]
            self.stop.check()
            self.report.start_batch(before + done, len(tasks))
            if self.plan.is_done(tasks):  # of a batch that was halved before
                self.report.start_views(sum(task.views for task in tasks))
                self.report.skip(self.plan.evaluations)
            elif not (yield from self._make(tasks)):
                memory.release()
                self.most = self._halved(len(tasks))
                self.report.take_back_batch(
                    f"not enough memory for {len(tasks)} images at a time; going on with "
                    f"{self.most}"
                )
                continue
            done += len(tasks)

    def _make(self, tasks: Sequence[Task]) -> Generator[ViewBatch, None, bool]:
        """Make these results and write them; False if memory does not suffice for it."""
        began = time.monotonic()
        try:
            pictures = [load(task, self.plan) for task in tasks]
            paths = self._state_paths(tasks, pictures)
            results = yield from _sampled(tasks, pictures, paths)
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            results = None
        if results is None:
            return False  # and nothing refers any more to what the attempt has made
        seconds = round((time.monotonic() - began) / len(tasks), 3)
        for task, picture, result in zip(tasks, pictures, results, strict=True):
            self._animate(task)  # first, because what is recorded is never looked at again
            if task.name not in self.plan.done:
                self._write(task, picture, result, seconds)
        for path in paths:
            with writing(path):
                storage.remove(path)
        return True

    def _halved(self, batch_size: int) -> int:
        """The size to go on with where memory does not suffice. Raises UserError if none is."""
        if batch_size > 1:
            return batch_size // 2
        device = self.inpainter.diffusion.device
        remedies = _remedies(device, self.job.recipe.speed, self.plan.config)
        advice = f"set {', or '.join(remedies)}" if remedies else "close other programs"
        raise UserError(f"{device} has not enough memory for one image; {advice}")

    def _state_paths(self, tasks: Sequence[Task], pictures: Sequence[Picture]) -> list[str]:
        """Where the states of the sampler go: with the first views, the second ones, and so on."""
        origins = [task.origin for task in tasks]
        views = max(picture.views for picture in pictures)
        state_path = self.job.records.state_path
        return [state_path(self.plan.digest, origins, number) for number in range(views)]

    def inpaint(self, batch: ViewBatch) -> np.ndarray | None:
        """What the sampler makes of these views, uint8 (B, H, W, 3); None: memory ran out.

        Raises UserError if it is not finite.
        """
        self.report.start_views(len(batch.views))
        resume = _earlier_state(batch.state_path)
        if resume is None:
            self._begin_film(batch.views)
        else:
            self.report.skip(self.inpainter.evaluations_before(resume))
        views = [each.view for each in batch.views]
        starts = [view.start for view in views]  # of all, or of none
        windows = views[0].windows  # of the only view, or none
        try:
            inpainter = self.inpainter if windows is None else self.inpainter.over_windows(windows)
            x = inpainter.sample(
                torch.stack([view.image for view in views]),
                torch.stack([view.keep_mask for view in views]),
                [each.stream for each in batch.views],
                start_picture=None if starts[0] is None else torch.stack(starts),
                resume=resume,
                after_evaluation=self._after_evaluation(batch),
            )
            return to_bytes(x)
        except NonFiniteError as error:
            raise UserError(self._non_finite(batch.views, error)) from error
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            return None

    def _after_evaluation(self, batch: ViewBatch) -> Callable[[Evaluation], None]:
        """What to do after each: show it, count it, and save the state in time.

        At the end too, where something else comes before the result is written.
        """
        every = self.plan.config.checkpoint_every
        more = self.film or any(each.task.views > 1 for each in batch.views)
        end = len(self.inpainter.times) - 1 if more else None
        saved = time.monotonic()

        def after_evaluation(evaluation: Evaluation) -> None:
            nonlocal saved
            try:
                self._show(batch.views, evaluation)
                self.report.evaluation_done(evaluation.pred_x0)
                self.stop.check()
            except (Interrupted, UserError):
                _save_state(batch.state_path, evaluation.state())
                raise
            if evaluation.position == end or time.monotonic() - saved >= every:
                _save_state(batch.state_path, evaluation.state())
                saved = time.monotonic()

        return after_evaluation

    def _write(self, task: Task, picture: Picture, result: np.ndarray, seconds: float) -> None:
        plan, records, png = self.plan, self.job.records, picture.encode(result)
        if task.is_first_sample:
            write_companions(plan.dataset, task.pair.name, picture)
        write(f"{plan.dataset.inpainted_dir}/{task.name}", png)
        line = Result(plan.run, plan.digest, task.origin, len(png), seconds, task.views)
        with writing(records.path):
            records.finished(task.name, line)

    def _begin_film(self, views: Sequence[TaskView]) -> None:
        if self.film:
            with writing(self.film.folder):
                for each in views:
                    self.film.begin(each.film_name)

    def _show(self, views: Sequence[TaskView], evaluation: Evaluation) -> None:
        if self.film and self.film.is_due(evaluation.position):
            names = [each.film_name for each in views]
            x_t, x0 = (self._as_pictures(views, x) for x in (evaluation.x_t, evaluation.pred_x0))
            with writing(self.film.folder):
                self.film.write(names, evaluation.position, x_t, x0)

    def _as_pictures(self, views: Sequence[TaskView], x: torch.Tensor) -> torch.Tensor:
        """What the sampler's x of these views shows, (B, 3, H, W)."""
        size = views[0].view.image.shape[1:]
        shown = self.inpainter.as_pictures(x, size)
        return torch.stack([v.view.as_picture(each) for v, each in zip(views, shown, strict=True)])

    def _animate(self, task: Task) -> None:
        if self.film:
            with writing(self.film.folder):
                for name in task.film_names:
                    self.film.finish(name)

    def _non_finite(self, views: Sequence[TaskView], error: NonFiniteError) -> str:
        names = [views[i].task.name for i in error.images]
        others = f" and {len(names) - 1} more" if names[1:] else ""
        return (
            f"{names[0]}{others}: what the network predicts is not finite (NaN or infinity) at "
            f"step {error.step}, after {self.report.view_calls} of {self.plan.evaluations} "
            f"evaluations; {self._remedy()}"
        )

    def _remedy(self) -> str:
        """What to do where the network's output is not finite."""
        if self.job.recipe.speed.precision == "fp16":
            offered = offered_precisions(self.inpainter.diffusion.device)
            others = [name for name in offered if name != "fp16"]
            return f"fp16 has no larger numbers than 65504: set precision: {' or '.join(others)}"
        path = self.plan.config.model_path
        return f"the checkpoint is likely damaged: download {path} again"

    def _await_others(self) -> None:
        """Show what the other ranks do, until they are done."""
        done, since = -1, time.monotonic()
        while self.job.team.add("batches done", 0) < len(self.plan.batches):
            self.stop.check()
            self.report.tell()
            if self.report.done != done:
                done, since = self.report.done, time.monotonic()
            if time.monotonic() - since > STALLED:
                raise UserError(
                    "another process has done nothing for half an hour, and counts as lost; run "
                    "the same command again to make what is missing"
                )
            time.sleep(POLLING)
        self.report.tell()  # what they did since the last look


def _sampled(
    tasks: Sequence[Task], pictures: Sequence[Picture], state_paths: Sequence[str]
) -> Generator[ViewBatch, None, list[np.ndarray] | None]:
    """The finished pictures, uint8 (H, W, 3) each; None if memory does not suffice.

    state_paths: of the batch of all first views, of that of all second ones, and so on.
    """
    results = [[] for _ in tasks]
    for number, path in enumerate(state_paths):
        chosen = [i for i, picture in enumerate(pictures) if number < picture.views]
        views = [TaskView(tasks[i], number, pictures[i].view(number)) for i in chosen]
        yield (batch := ViewBatch(views, path))
        if batch.results is None:
            return None
        for i, result in zip(chosen, batch.results, strict=True):
            results[i].append(result)
    return [picture.finish(made) for picture, made in zip(pictures, results, strict=True)]


def load(task: Task, plan: Plan) -> Picture:
    """Raises UserError if a file cannot be read, or is not the one that the plan is for."""
    files, origin, config = read_pair(task.pair), task.origin, plan.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan has told what there is to be told of them
        picture = decode_pair(
            files,
            plan.dataset,
            config.image_size,
            flip=origin.flip,
            known_from=config.known_from,
            grey=config.grey,
        )
    digests = origin.image, origin.mask, origin.start
    for file, digest in zip((files.image, files.mask, files.start), digests, strict=True):
        if file and file.digest != digest:
            raise UserError(f"{file.path} changed during the run; run the same command again")
    return picture


def _remedies(device: torch.device, speed: Speed, config: Config) -> list[str]:
    """Settings that take less memory, or other memory, for one image."""
    half = [name for name in offered_precisions(device) if DTYPES[name].itemsize == 2]
    remedies = []
    if half and speed.dtype.itemsize == 4:
        remedies.append(f"precision: {' or '.join(half)} (half the memory)")
    if config.image_size is None:
        remedies.append(
            "image_size: 512 and, in the dataset, fit: region (the hole's surroundings)"
        )
    elif config.latent and config.image_size > 512:
        remedies.append("a smaller image_size, such as 512")
    if device.type != "cpu":
        remedies.append("device: cpu")
    return remedies


def _earlier_state(path: str) -> SamplerState | None:
    """Where an earlier run stopped in this batch."""
    try:
        state = load_state(path)
    except (OSError, ValueError) as error:
        message = f"{path}: {error}; the images of this state start afresh"
        warnings.warn(message, UserWarning, stacklevel=2)
        return None
    return state and SamplerState(**state)


def _save_state(path: str, state: SamplerState) -> None:
    """A precaution, whose failure does not end the run."""
    x = state.x.cpu()
    if not x.isfinite().all():  # on a GPU, that is found some evaluations later
        return
    try:
        save_state(path, vars(state) | {"x": x})
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"cannot save the state in {path}: {reason}", UserWarning, stacklevel=2)


def write_companions(d: DatasetConfig, name: str, picture: Picture) -> None:
    """The input, the mask, and the input under the mask."""
    companions, colours = picture.companions(), picture.kept.of_colours
    pngs = {
        d.gt_masked_dir: encode_png(companions.gt_masked, colours),
        d.keep_mask_dir: encode_png(companions.keep_mask),
    }
    if d.gt_dir is not None:
        pngs[d.gt_dir] = encode_png(companions.gt, colours)
    for folder, png in pngs.items():
        write(f"{folder}/{name}", png)


def write(path: str, data: bytes) -> None:
    """Raises UserError where that is impossible."""
    with writing(path):
        storage.write_atomically(path, data)
