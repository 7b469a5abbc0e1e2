"""One run: the batches, the files. Knows an inpainter, not how it is made."""

from __future__ import annotations

import contextlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from guided_diffusion import memory, storage
from guided_diffusion.accel import DTYPES, Speed, offered_precisions
from guided_diffusion.config import Config, DatasetConfig, UserError, to_yaml_dict
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.dist_util import Team
from guided_diffusion.image_datasets import (
    Example,
    load_pair,
    paste_known,
    to_bytes,
)
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.interrupts import Interrupted, StopSignals
from guided_diffusion.pictures import encode_png
from guided_diffusion.plan import (
    Identity,
    Plan,
    Task,
    companion_folders,
    counted,
    existing,
    input_digest,
)
from guided_diffusion.progress import ProgressReport
from guided_diffusion.records import Records, Result, load_state, save_state
from guided_diffusion.repaint import Evaluation, SamplerState

POLLING = 0.5  # seconds between two looks at what other processes do
STALLED = 30 * 60  # seconds without an evaluation, after which another process counts as lost


def run(
    plan: Plan,
    load_inpainter: Callable[[Config], Inpainter],
    identity: Identity,
    records: Records,
    team: Team,
) -> None:
    """Make what the plan has that is not done, together with the other processes.

    Raises Interrupted after a signal, and UserError; what was written before is complete, and what
    was begun goes on in the next run.
    """
    if not plan.is_done(plan.tasks):
        inpainter = load_inpainter(plan.config)
        prepare = partial(_prepare, plan, inpainter, identity, records)
        plan = replace(plan, **team.share("settled plan", prepare))
        if team.is_first:
            team.world.say(plan.describe(identity.device, identity.speed))
        size = _do_batches(plan, inpainter, identity.speed, records, team)
        plan = replace(plan, batch_size=size)
    if team.is_first:
        _finish(plan, identity, records)
        team.world.say(plan.describe_results())
    team.leave()


# ---- Before the first batch -------------------------------------------------------------------


def _prepare(
    plan: Plan, inpainter: Inpainter, identity: Identity, records: Records
) -> dict[str, Any]:
    """What rank 0 does once all is checked and the network is loaded; the first to write anything.

    Returns fields of the plan that are settled only now. Raises UserError.
    """
    records.lock()
    if records.history().run >= plan.run:
        raise UserError(
            f"another run has just written to {plan.dataset.inpainted_dir}; run the same command "
            "again to go on from there"
        )
    plan = replace(plan, batch_size=_batch_size(plan, inpainter), digest=identity.digest)
    with _writing(records.path):
        records.begin(plan.run, plan.config.seed, identity.settings)
        records.set_aside(plan.run, plan.redo)
    _set_aside(plan)
    _write_run_json(plan, identity)
    return {"batch_size": plan.batch_size, "digest": plan.digest}


def _batch_size(plan: Plan, inpainter: Inpainter) -> int:
    """The plan's; for `auto`, as many images as a GPU holds."""
    if plan.batch_size != "auto":
        return plan.batch_size
    first_step = replace(inpainter, times=(inpainter.times[0], -1))

    def evaluate(images: int) -> None:
        blank = torch.zeros(images, 3, inpainter.image_size, inpainter.image_size)
        with contextlib.suppress(NonFiniteError):  # the run will tell, with the image's name
            first_step.sample(blank, blank, range(images))

    device = inpainter.diffusion.device
    return memory.measure_largest_batch(evaluate, device, most=len(plan.tasks))


def _set_aside(plan: Plan) -> None:
    """Take away the results that do not count any more, so that nothing stale has a final name."""
    for task in plan.tasks:
        if task.name in plan.redo:
            old = f"{plan.old_dir}/{task.name}"
            with _writing(old):
                storage.move(f"{plan.dataset.inpainted_dir}/{task.name}", old)
                for folder in companion_folders(plan.dataset):
                    storage.remove(f"{folder}/{task.pair.name}")


# ---- The batches ------------------------------------------------------------------------------


def _do_batches(
    plan: Plan, inpainter: Inpainter, speed: Speed, records: Records, team: Team
) -> int:
    """Inpaint the batches that this process gets; the batch size that memory sufficed for.

    On rank 0 it returns when all processes are done.
    """
    images, show_bar = sum(map(len, plan.batches)), plan.config.show_progress
    with (
        ProgressReport(images, plan.evaluations, show_bar, team) as report,
        StopSignals(team.world.label) as stop,
    ):
        worker = _Worker(plan, inpainter, speed, records, team, report, stop, plan.batch_size)
        try:
            worker.work()
        except Interrupted:  # torchrun interrupts all, and each has a state to save
            raise
        except Exception as error:
            team.stop(str(error))
            raise
    return worker.most


@dataclass
class _Worker:
    """One process at work."""

    plan: Plan
    inpainter: Inpainter
    speed: Speed
    records: Records
    team: Team
    report: ProgressReport
    stop: StopSignals
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
                self.report.skip(self.plan.evaluations)
            elif not self._finish(part):
                memory.release()
                self.most = _halved(len(part), self.inpainter.diffusion.device, self.speed)
                self.report.take_back_batch(
                    f"not enough memory for {len(part)} images at a time; going on with {self.most}"
                )
                continue
            done += len(part)

    def _finish(self, part: Sequence[Task]) -> bool:
        """Inpaint a batch and write its results; False if memory does not suffice for it."""
        started = time.monotonic()
        examples = [_load(task, self.inpainter.image_size) for task in part]
        state_path = self.records.state_path(self.plan.digest, [task.origin for task in part])
        try:
            results = self._inpaint(part, examples, state_path)
        except torch.cuda.OutOfMemoryError:
            return False  # and nothing refers any more to what the attempt has made
        except NonFiniteError as error:
            raise UserError(self._non_finite(part, error)) from error
        seconds = round((time.monotonic() - started) / len(part), 3)
        for task, example, result in zip(part, examples, results, strict=True):
            if task.name not in self.plan.done:
                self._write(task, example, result, seconds)
        with _writing(state_path):
            storage.remove(state_path)
        return True

    def _inpaint(
        self, part: Sequence[Task], examples: Sequence[Example], state_path: str
    ) -> np.ndarray:
        """The results of a batch, uint8 (B, S, S, 3)."""
        gt = torch.stack([example.image for example in examples])
        keep_mask = torch.stack([example.keep_mask for example in examples])
        seeds = [task.origin.stream for task in part]
        start = _earlier_state(state_path)
        if start is not None:
            self.report.skip(self.inpainter.evaluations_before(start))
        x = self.inpainter.sample(
            gt, keep_mask, seeds, start=start, after_evaluation=self._checkpoints(state_path)
        )
        if not self.inpainter.paste_known:
            return to_bytes(x)
        originals = np.stack([example.image_bytes for example in examples])
        return paste_known(to_bytes(x), originals, keep_mask)

    def _checkpoints(self, state_path: str) -> Callable[[Evaluation], None]:
        """What to do after each evaluation: count it; save the state in time, and at the end."""
        every = self.plan.config.checkpoint_every
        saved = time.monotonic()

        def after_evaluation(evaluation: Evaluation) -> None:
            nonlocal saved
            try:
                self.report.evaluation_done(evaluation.pred_x0)
                self.stop.check()
            except (Interrupted, UserError):
                _save_state(state_path, evaluation.state())
                raise
            if time.monotonic() - saved >= every:
                _save_state(state_path, evaluation.state())
                saved = time.monotonic()

        return after_evaluation

    def _write(self, task: Task, example: Example, result: np.ndarray, seconds: float) -> None:
        d, png = self.plan.dataset, encode_png(result)
        if task.is_first_sample:
            _write_companions(d, task.pair.name, example)
        _write(f"{d.inpainted_dir}/{task.name}", png)
        line = Result(self.plan.run, self.plan.digest, task.origin, len(png), seconds)
        with _writing(self.records.path):
            self.records.finished(task.name, line)

    def _non_finite(self, part: Sequence[Task], error: NonFiniteError) -> str:
        names = [part[i].name for i in error.images]
        others = f" and {len(names) - 1} more" if names[1:] else ""
        return (
            f"{names[0]}{others}: what the network predicts is not finite (NaN or infinity) at "
            f"step {error.step}, after {self.report.batch_calls} of {self.plan.evaluations} "
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


def _load(task: Task, image_size: int) -> Example:
    """Raises UserError if a file cannot be read, or is not the one that the plan is for."""
    example = load_pair(task.pair, image_size, task.origin.flip)
    for path, digest in (
        (task.pair.image_path, task.origin.image),
        (task.pair.mask_path, task.origin.mask),
    ):
        if input_digest(path) != digest:
            raise UserError(f"{path} changed during the run; run the same command again")
    return example


def _halved(batch_size: int, device: torch.device, speed: Speed) -> int:
    """The size to go on with where memory does not suffice. Raises UserError if there is none."""
    if batch_size > 1:
        return batch_size // 2
    remedies = ["device: cpu"]
    if speed.dtype.itemsize == 4:
        half = [name for name in offered_precisions(device) if DTYPES[name].itemsize == 2]
        remedies.insert(0, f"precision: {' or '.join(half)} (half the memory)")
    raise UserError(f"{device} has not enough memory for one image; set {', or '.join(remedies)}")


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


# ---- After the last batch ---------------------------------------------------------------------


def _finish(plan: Plan, identity: Identity, records: Records) -> None:
    """What rank 0 does when all is done: look whether all is there, and say so in run.json.

    Raises UserError if something else has removed results meanwhile.
    """
    _restore_companions(plan)
    history, sizes = records.history(), existing(plan.dataset.inpainted_dir)
    results = {task.name: history.results.get(task.name) for task in plan.tasks}
    missing = [
        name
        for name, result in results.items()
        if not (result and result.digest == identity.digest and result.bytes == sizes.get(name))
    ]
    if missing:
        raise UserError(
            f"{counted(len(missing), 'result')} of {len(results)} went missing, first "
            f"{missing[0]}: something else changed {plan.dataset.inpainted_dir} or "
            f"{records.folder} meanwhile; run the same command again to make what is missing"
        )
    seconds = {name: result.seconds for name, result in results.items()}
    _write_run_json(plan, identity, seconds)
    with _writing(records.folder):
        records.forget_states()


def _restore_companions(plan: Plan) -> None:
    """Write anew what is missing of the pictures that need no network."""
    present = [existing(folder).keys() for folder in companion_folders(plan.dataset)]
    for task in plan.tasks:
        if task.is_first_sample and not all(task.pair.name in names for names in present):
            example = _load(task, plan.config.network.image_size)
            _write_companions(plan.dataset, task.pair.name, example)


# ---- Files ------------------------------------------------------------------------------------


def _write_companions(d: DatasetConfig, name: str, example: Example) -> None:
    """The input, the mask, and the input under the mask."""
    gt, m = example.image, example.keep_mask
    pictures = {d.gt_masked_dir: gt * m - (1 - m), d.keep_mask_dir: 2 * m - 1}
    if d.gt_dir is not None:
        pictures[d.gt_dir] = gt
    for folder, picture in pictures.items():
        _write(f"{folder}/{name}", encode_png(to_bytes(picture[None])[0]))


def _write(path: str, data: bytes) -> None:
    with _writing(path):
        storage.write_atomically(path, data)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """Errors as UserError, for the disk may be full by now, or a folder be in the way."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was written before is "
            "complete, and the same command goes on from there"
        ) from error


def _write_run_json(
    plan: Plan, identity: Identity, seconds: dict[str, float] | None = None
) -> None:
    """What was run, on what, and how long it took. seconds: of each result; None: not finished."""
    content = {
        "finished": seconds is not None,
        "config": to_yaml_dict(plan.config),
        "seed": plan.config.seed,
        "device": str(identity.device),
        "speed": asdict(identity.speed),
        "batch_size": plan.batch_size,
        "versions": _versions(),
        "images": plan.images,
        "evaluations_per_image": plan.evaluations,
        "evaluations": plan.total_evaluations,
        "seconds_per_image": seconds or {},
        "checkpoints": list(identity.checkpoints.values()),
    }
    _write(plan.record_path, f"{json.dumps(content, indent=2)}\n".encode())


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {"python": platform.python_version(), **packages}
