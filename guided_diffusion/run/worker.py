"""One process of a run: its batches, from files to results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from guided_diffusion.config import Config, DatasetConfig, UserError
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.images.files import encode_png
from guided_diffusion.images.tensors import to_bytes
from guided_diffusion.images.views import Crop, Photo, load_example
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.machine import memory, storage
from guided_diffusion.machine.ranks import Team
from guided_diffusion.machine.signals import Interrupted, StopSignals
from guided_diffusion.output.film import FilmLog
from guided_diffusion.repaint import Evaluation, SamplerState
from guided_diffusion.run.plan import Plan, Task, input_digest, stream_of_view
from guided_diffusion.run.progress import ProgressReport
from guided_diffusion.run.records import Records, Result, load_state, save_state, writing
from guided_diffusion.speed.choice import DTYPES, Speed, offered_precisions

POLLING = 0.5  # seconds between two looks at what other processes do
STALLED = 30 * 60  # seconds without an evaluation, after which another process counts as lost


@dataclass
class Worker:
    """One process at work."""

    plan: Plan
    inpainter: Inpainter
    speed: Speed
    records: Records
    team: Team
    report: ProgressReport
    stop: StopSignals
    log: FilmLog | None  # None: the process is not shown
    most: int  # images at a time that memory suffices for, as far as is known

    def work(self) -> None:
        batches = self.plan.batches
        before = [0, *accumulate(map(len, batches))]
        # Handed out one by one, so that nobody waits for a slow process.
        while (number := self.team.add("batches begun", 1) - 1) < len(batches):
            self._do(batches[number], before[number])
            self.report.tell()
            self.team.add("batches done", 1)
        if self.team.is_first:
            self._await_others()

    def _do(self, tasks: Sequence[Task], before: int) -> None:
        done = 0
        while done < len(tasks):
            part = tasks[done : done + self.most]
            self.stop.check()
            self.report.start_batch(before + done, len(part))
            if self.plan.is_done(part):  # of a batch that was halved before
                self.report.start_inputs(sum(task.inputs for task in part))
                self.report.skip(self.plan.evaluations)
            elif not self._finish(part):
                memory.release()
                self.most = self._halved(len(part))
                self.report.take_back_batch(
                    f"not enough memory for {len(part)} images at a time; going on with {self.most}"
                )
                continue
            done += len(part)

    def _finish(self, part: Sequence[Task]) -> bool:
        """Inpaint a batch and write its results; False if memory does not suffice for it."""
        started = time.monotonic()
        try:
            examples = [load(task, self.plan) for task in part]
            results = self._results(part, examples)
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            return False  # and nothing refers any more to what the attempt has made
        seconds = round((time.monotonic() - started) / len(part), 3)
        for task, example, result in zip(part, examples, results, strict=True):
            self._animate(task)  # first, for what is recorded is never looked at again
            if task.name not in self.plan.done:
                self._write(task, example, result, seconds)
        for path in self._state_paths(part, examples):
            with writing(path):
                storage.remove(path)
        return True

    def _halved(self, batch_size: int) -> int:
        """The size to go on with where memory does not suffice. Raises UserError if none is."""
        if batch_size > 1:
            return batch_size // 2
        device = self.inpainter.diffusion.device
        remedies = _remedies(device, self.speed, self.plan.config)
        advice = f"set {', or '.join(remedies)}" if remedies else "close other programs"
        raise UserError(f"{device} has not enough memory for one image; {advice}")

    def _results(self, part: Sequence[Task], examples: Sequence[Crop | Photo]) -> list[np.ndarray]:
        """The finished pictures of a batch, uint8 (H, W, 3) each.

        Where pictures have several views, the k-th ones are a batch of their own for each k.
        """
        results = [[] for _ in part]
        for k, path in enumerate(self._state_paths(part, examples)):
            chosen = [i for i, example in enumerate(examples) if k < example.views]
            inputs = [_Input(part[i], examples[i], k) for i in chosen]
            for i, result in zip(chosen, self._inpaint(inputs, path), strict=True):
                results[i].append(result)
        return [
            example.finish(of_views) for example, of_views in zip(examples, results, strict=True)
        ]

    def _state_paths(self, part: Sequence[Task], examples: Sequence[Crop | Photo]) -> list[str]:
        """Where the sampler's states go for the first views of a batch, the second, and so on."""
        origins = [task.origin for task in part]
        views = max(example.views for example in examples)
        parts = [(k,) if k else () for k in range(views)]
        return [self.records.state_path(self.plan.digest, origins, *which) for which in parts]

    def _inpaint(self, inputs: Sequence[_Input], state_path: str) -> np.ndarray:
        """The results of views, uint8 (B, S, S, 3). Raises UserError if they are not finite."""
        self.report.start_inputs(len(inputs))
        start = _earlier_state(state_path)
        if start is None:
            self._begin_log(inputs)
        else:
            self.report.skip(self.inpainter.evaluations_before(start))
        views = [each.example.view(each.k) for each in inputs]
        pictures = [view.start for view in views]  # all, or none
        try:
            x = self.inpainter.sample(
                torch.stack([view.image for view in views]),
                torch.stack([view.keep_mask for view in views]),
                [each.stream for each in inputs],
                picture=None if pictures[0] is None else torch.stack(pictures),
                start=start,
                after_evaluation=self._after_evaluation(inputs, state_path, views[0].image.shape),
            )
        except NonFiniteError as error:
            raise UserError(self._non_finite(inputs, error)) from error
        return to_bytes(x)

    def _after_evaluation(
        self, inputs: Sequence[_Input], state_path: str, shape: Sequence[int]
    ) -> Callable[[Evaluation], None]:
        """What to do after each: show it, count it, and save the state in time.

        At the end too, where something else comes before the result is written. shape: (3, H, W)
        of each input.
        """
        every = self.plan.config.checkpoint_every
        more = self.log or any(each.example.views > 1 for each in inputs)
        end = len(self.inpainter.times) - 1 if more else None
        saved = time.monotonic()

        def after_evaluation(evaluation: Evaluation) -> None:
            nonlocal saved
            try:
                self._show(inputs, evaluation, shape[1:])
                self.report.evaluation_done(evaluation.pred_x0)
                self.stop.check()
            except (Interrupted, UserError):
                _save_state(state_path, evaluation.state())
                raise
            if evaluation.position == end or time.monotonic() - saved >= every:
                _save_state(state_path, evaluation.state())
                saved = time.monotonic()

        return after_evaluation

    def _write(self, task: Task, example: Crop | Photo, result: np.ndarray, seconds: float) -> None:
        d, png = self.plan.dataset, encode_png(result)
        if task.is_first_sample:
            write_companions(d, task.pair.name, example)
        write(f"{d.inpainted_dir}/{task.name}", png)
        line = Result(self.plan.run, self.plan.digest, task.origin, len(png), seconds, task.inputs)
        with writing(self.records.path):
            self.records.finished(task.name, line)

    def _begin_log(self, inputs: Sequence[_Input]) -> None:
        if self.log:
            with writing(self.log.folder):
                for each in inputs:
                    self.log.begin(each.log_name)

    def _show(self, inputs: Sequence[_Input], evaluation: Evaluation, size: Sequence[int]) -> None:
        if self.log and self.log.is_due(evaluation.position):
            names = [each.log_name for each in inputs]
            x_t, x0 = (
                self.inpainter.as_pictures(x, size) for x in (evaluation.x, evaluation.pred_x0)
            )
            with writing(self.log.folder):
                self.log.write(names, evaluation.position, x_t, x0)

    def _animate(self, task: Task) -> None:
        if self.log:
            with writing(self.log.folder):
                for name in task.log_names:
                    self.log.finish(name)

    def _non_finite(self, inputs: Sequence[_Input], error: NonFiniteError) -> str:
        names = [inputs[i].task.name for i in error.images]
        others = f" and {len(names) - 1} more" if names[1:] else ""
        return (
            f"{names[0]}{others}: what the network predicts is not finite (NaN or infinity) at "
            f"step {error.step}, after {self.report.input_calls} of {self.plan.evaluations} "
            f"evaluations; {self._remedy()}"
        )

    def _remedy(self) -> str:
        """What to do where the network's output is not finite."""
        if self.speed.precision == "fp16":
            offered = offered_precisions(self.inpainter.diffusion.device)
            others = [name for name in offered if name != "fp16"]
            return f"fp16 has no larger numbers than 65504: set precision: {' or '.join(others)}"
        path = self.plan.config.model_path
        return f"the checkpoint is likely damaged: download {path} again"

    def _await_others(self) -> None:
        """Show what the other processes do, until they are done."""
        done, since = -1, time.monotonic()
        while self.team.add("batches done", 0) < len(self.plan.batches):
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


@dataclass(frozen=True)
class _Input:
    """One of the squares that the network sees at a time."""

    task: Task
    example: Crop | Photo
    k: int  # which of the picture's views

    @property
    def stream(self) -> int:
        return stream_of_view(self.task.origin.stream, self.k)

    @property
    def log_name(self) -> str:
        """Under which the process is shown."""
        return self.task.log_names[self.k]


def load(task: Task, plan: Plan) -> Crop | Photo:
    """Raises UserError if a file cannot be read, or is not the one that the plan is for."""
    example = load_example(
        task.pair,
        plan.dataset,
        plan.config.image_size,
        flip=task.origin.flip,
        known_from=plan.config.known_from,
    )
    for path, digest in (
        (task.pair.image_path, task.origin.image),
        (task.pair.mask_path, task.origin.mask),
        (task.pair.start_path, task.origin.start),
    ):
        if path and input_digest(path) != digest:
            raise UserError(f"{path} changed during the run; run the same command again")
    return example


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


def write_companions(d: DatasetConfig, name: str, example: Crop | Photo) -> None:
    """The input, the mask, and the input under the mask."""
    companions = example.companions()
    pictures = {d.gt_masked_dir: companions.gt_masked, d.keep_mask_dir: companions.keep_mask}
    if d.gt_dir is not None:
        pictures[d.gt_dir] = companions.gt
    for folder, picture in pictures.items():
        write(f"{folder}/{name}", encode_png(picture))


def write(path: str, data: bytes) -> None:
    with writing(path):
        storage.write_atomically(path, data)
