"""One run: the plan, the batches, the files. Knows an inpainter, not how it is made."""

import contextlib
import hashlib
import json
import os
import platform
import random
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch

from guided_diffusion import memory, storage
from guided_diffusion.accel import DTYPES, Speed, offered_precisions
from guided_diffusion.config import Config, DatasetConfig, UserError, to_yaml_dict
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.image_datasets import (
    Example,
    Pair,
    check_pairs,
    encode_png,
    find_pairs,
    flip_decision,
    load_pair,
    paste_known,
    to_bytes,
)
from guided_diffusion.inpainter import Inpainter, Progress
from guided_diffusion.progress import ProgressReport
from guided_diffusion.scheduler import count_evaluations

MAX_SEED = 2**31 - 1  # of seeds drawn afresh: short enough to type


@dataclass(frozen=True)
class Plan:
    """What a run will do, settled before any weight is loaded."""

    config: Config  # with the seed that will be used
    dataset: DatasetConfig
    seed: int
    pairs: list[Pair]  # in the order of work
    batch_size: int | Literal["auto"]  # to begin with; auto: still to be measured
    evaluations: int  # of the network, per image

    @property
    def images(self) -> int:
        return len(self.pairs)

    @property
    def total_evaluations(self) -> int:
        """One for each image of a batch."""
        return self.images * self.evaluations

    @property
    def record_path(self) -> str:
        """Where run.json goes: beside the folder of the results."""
        return os.path.join(os.path.dirname(self.dataset.inpainted_dir.rstrip("/")), "run.json")

    def describe(self, device: torch.device, speed: Speed) -> str:
        """A few lines for people."""
        d = self.dataset
        measured = d.batch_size == "auto" and self.batch_size != "auto"
        return (
            f"{self.config.name}: {_counted(self.images, 'image')} from {d.gt_path}, "
            f"masks from {d.mask_path}, batch size {self.batch_size}{' (auto)' * measured}\n"
            f"{_counted(self.evaluations, 'network evaluation')} per image, "
            f"{self.total_evaluations:,} in all\n"
            f"seed {self.seed} (to repeat this run: --set seed={self.seed})\n"
            f"device {device}, {speed.describe()}"
        )


def make_plan(config: Config, times: Sequence[int], device: torch.device) -> Plan:
    """Pair and check all inputs and outputs. Raises UserError for what cannot work."""
    dataset = config.dataset
    if dataset is None:
        raise UserError(f"{config.source}: data.eval: missing; name one dataset")
    pairs = find_pairs(dataset.gt_path, dataset.mask_path, dataset.offset, dataset.max_len)
    check_pairs(pairs, config.network.image_size)
    for folder in _output_folders(dataset):
        _check_output_folder(folder)
    seed = config.seed if config.seed is not None else secrets.randbelow(MAX_SEED)
    if not dataset.deterministic:
        random.Random(seed).shuffle(pairs)
    size = dataset.batch_size
    if size == "auto" and device.type != "cuda":
        size = 1  # elsewhere, larger batches are hardly faster
    if dataset.drop_last:
        pairs = _whole_batches(pairs, size, config.source)
    return Plan(replace(config, seed=seed), dataset, seed, pairs, size, count_evaluations(times))


def _whole_batches(pairs: list[Pair], size: int, source: str) -> list[Pair]:
    if len(pairs) < size:
        raise UserError(
            f"{source}: drop_last leaves no batch: there are {len(pairs)} image(s), fewer than "
            f"batch_size {size}; set drop_last: false"
        )
    return pairs[: len(pairs) - len(pairs) % size]


def fit_batch_size(plan: Plan, inpainter: Inpainter) -> Plan:
    """The plan with a number for a batch size that is `auto`: the most that a GPU holds."""
    if plan.batch_size != "auto":
        return plan
    first_step = replace(inpainter, times=(inpainter.times[0], -1))

    def evaluate(images: int) -> None:
        blank = torch.zeros(images, 3, inpainter.image_size, inpainter.image_size)
        with contextlib.suppress(NonFiniteError):  # the run will tell, with the image's name
            first_step.sample(blank, blank, range(images))

    device = inpainter.diffusion.device
    return replace(
        plan, batch_size=memory.measure_largest_batch(evaluate, device, most=plan.images)
    )


def run(plan: Plan, inpainter: Inpainter, speed: Speed) -> None:
    """Inpaint all images of the plan and write the results, and run.json beside them.

    plan: its batch size a number, see `fit_batch_size`. speed: the inpainter's. Raises UserError;
    what was written before is complete.
    """
    record = _RunRecord(plan, inpainter.diffusion.device, speed)
    record.write()
    size, done = plan.batch_size, 0
    with ProgressReport(plan.images, plan.evaluations, plan.config.show_progress) as report:
        while done < plan.images:
            start = time.monotonic()
            batch = plan.pairs[done : done + size]
            report.start_batch(done, len(batch))
            if _finish(plan, inpainter, speed, batch, report):
                record.add(batch, time.monotonic() - start)
                done += len(batch)
            else:
                memory.release()
                size = _halved(len(batch), inpainter.diffusion.device, speed)
                report.take_back_batch(
                    f"not enough memory for {len(batch)} images at a time; going on with {size}"
                )
    record.finish(size)


def _finish(
    plan: Plan, inpainter: Inpainter, speed: Speed, batch: Sequence[Pair], report: ProgressReport
) -> bool:
    """Inpaint a batch and write its results; False if memory does not suffice for it."""
    examples = [_load(plan, pair) for pair in batch]
    try:
        results = _inpaint(plan, inpainter, batch, examples, report.evaluation_done)
    except torch.cuda.OutOfMemoryError:
        return False  # and nothing refers any more to what the attempt has made
    except NonFiniteError as error:
        names = [batch[i].name for i in error.images]
        others = f" and {len(names) - 1} more" if names[1:] else ""
        raise UserError(
            f"{names[0]}{others}: what the network predicts is not finite (NaN or infinity) at "
            f"step {error.step}, after {report.batch_calls} of {plan.evaluations} evaluations; "
            f"{_remedy(plan, inpainter.diffusion.device, speed)}"
        ) from error
    for pair, example, result in zip(batch, examples, results, strict=True):
        _write_outputs(plan.dataset, pair, example, result)
    return True


def _halved(batch_size: int, device: torch.device, speed: Speed) -> int:
    """The size to go on with where memory does not suffice. Raises UserError if there is none."""
    if batch_size > 1:
        return batch_size // 2
    remedies = ["device: cpu"]
    if speed.dtype.itemsize == 4:
        half = [name for name in offered_precisions(device) if DTYPES[name].itemsize == 2]
        remedies.insert(0, f"precision: {' or '.join(half)} (half the memory)")
    raise UserError(f"{device} has not enough memory for one image; set {', or '.join(remedies)}")


def _remedy(plan: Plan, device: torch.device, speed: Speed) -> str:
    """What to do where the network's output is not finite."""
    if speed.precision == "fp16":
        others = [name for name in offered_precisions(device) if name != "fp16"]
        return f"fp16 has no larger numbers than 65504: set precision: {' or '.join(others)}"
    return f"the checkpoint is likely damaged: download {plan.config.model_path} again"


def _load(plan: Plan, pair: Pair) -> Example:
    flip = plan.dataset.random_flip and flip_decision(plan.seed, pair.index)
    return load_pair(pair, plan.config.network.image_size, flip)


def _inpaint(
    plan: Plan,
    inpainter: Inpainter,
    batch: Sequence[Pair],
    examples: Sequence[Example],
    progress: Progress,
) -> np.ndarray:
    """The results of a batch, uint8 (B, S, S, 3)."""
    gt = torch.stack([example.image for example in examples])
    keep_mask = torch.stack([example.keep_mask for example in examples])
    seeds = [plan.seed + pair.index for pair in batch]
    results = to_bytes(inpainter.sample(gt, keep_mask, seeds, progress))
    if inpainter.paste_known:
        originals = np.stack([example.image_bytes for example in examples])
        results = paste_known(results, originals, keep_mask)
    return results


def _write_outputs(d: DatasetConfig, pair: Pair, example: Example, result: np.ndarray) -> None:
    gt, m = example.image, example.keep_mask
    pictures = {
        d.inpainted_dir: result,
        d.gt_masked_dir: _picture(gt * m - (1 - m)),
        d.keep_mask_dir: _picture(2 * m - 1),
    }
    if d.gt_dir is not None:
        pictures[d.gt_dir] = _picture(gt)
    for folder, picture in pictures.items():
        _write(f"{folder}/{pair.name}", encode_png(picture))


def _write(path: str, data: bytes) -> None:
    """Raises UserError, for the disk may be full by now, or a folder be in the way."""
    try:
        storage.write_atomically(path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was written before is complete"
        ) from error


def _picture(x: torch.Tensor) -> np.ndarray:
    return to_bytes(x[None])[0]


def _output_folders(d: DatasetConfig) -> list[str]:
    folders = (d.inpainted_dir, d.gt_masked_dir, d.gt_dir, d.keep_mask_dir)
    return [folder for folder in folders if folder is not None]


def _check_output_folder(folder: str) -> None:
    try:
        storage.check_writable(folder)
    except OSError as error:
        raise UserError(
            f"cannot write in the output folder {folder}: {error.strerror or error}; change "
            "`paths` in the config, or the folder's permissions"
        ) from error


class _RunRecord:
    """run.json: what was run, on what, and how long it took; complete once `finished` is true."""

    def __init__(self, plan: Plan, device: torch.device, speed: Speed):
        self.path = plan.record_path
        self.seconds: dict[str, float] = {}
        self.content: dict[str, Any] = {
            "finished": False,
            "config": to_yaml_dict(plan.config),
            "seed": plan.seed,
            "device": str(device),
            "speed": asdict(speed),
            "batch_size": plan.batch_size,
            "versions": _versions(),
            "images": plan.images,
            "evaluations_per_image": plan.evaluations,
            "evaluations": plan.total_evaluations,
            "seconds_per_image": self.seconds,
        }
        # Reading a large checkpoint again takes seconds, which the sampling need not wait for.
        paths = [plan.config.model_path]
        if plan.config.classifier and plan.config.classifier.path:
            paths.append(plan.config.classifier.path)
        pool = ThreadPoolExecutor(1)
        self.checkpoints = [pool.submit(_fingerprint, path) for path in paths]
        pool.shutdown(wait=False)

    def add(self, batch: Sequence[Pair], seconds: float) -> None:
        """Note that a batch is written; its images share the time that it took."""
        self.seconds |= {pair.name: round(seconds / len(batch), 3) for pair in batch}

    def finish(self, batch_size: int) -> None:
        """batch_size: what was left of it in the end."""
        self.content["batch_size"] = batch_size
        self.content["checkpoints"] = [future.result() for future in self.checkpoints]
        self.content["finished"] = True
        self.write()

    def write(self) -> None:
        text = json.dumps(self.content, indent=2)
        _write(self.path, f"{text}\n".encode())


def _fingerprint(path: str) -> dict[str, Any]:
    with storage.open_binary(path) as file:
        digest = hashlib.sha256()
        size = 0
        while chunk := file.read(2**20):
            digest.update(chunk)
            size += len(chunk)
    return {"path": path, "bytes": size, "sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {"python": platform.python_version(), **packages}


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
