"""One run: the plan, the batches, the files. Knows an inpainter, not how it is made."""

import hashlib
import json
import os
import platform
import random
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from guided_diffusion import storage
from guided_diffusion.config import Config, DatasetConfig, UserError, to_yaml_dict
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
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.scheduler import count_evaluations

MAX_SEED = 2**31 - 1  # of seeds drawn afresh: short enough to type


@dataclass(frozen=True)
class Plan:
    """What a run will do, settled before any weight is loaded."""

    config: Config  # with the seed that will be used
    dataset: DatasetConfig
    seed: int
    batches: list[list[Pair]]
    evaluations: int  # of the network, per image

    @property
    def images(self) -> int:
        return sum(map(len, self.batches))

    @property
    def total_evaluations(self) -> int:
        """One for each image of a batch."""
        return self.images * self.evaluations

    @property
    def record_path(self) -> str:
        """Where run.json goes: beside the folder of the results."""
        return os.path.join(os.path.dirname(self.dataset.inpainted_dir.rstrip("/")), "run.json")

    def describe(self, device: torch.device) -> str:
        """A few lines for people."""
        d = self.dataset
        return (
            f"{self.config.name}: {_counted(self.images, 'image')} from {d.gt_path}, "
            f"masks from {d.mask_path}, batch size {d.batch_size}\n"
            f"{_counted(self.evaluations, 'network evaluation')} per image, "
            f"{self.total_evaluations:,} in all\n"
            f"seed {self.seed} (to repeat this run: --set seed={self.seed}), device {device}"
        )


def make_plan(config: Config, times: Sequence[int]) -> Plan:
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
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    if dataset.drop_last and len(batches[-1]) < size:
        batches.pop()
    if not batches:
        raise UserError(
            f"{config.source}: drop_last leaves no batch: there are {len(pairs)} image(s), fewer "
            f"than batch_size {size}; set drop_last: false"
        )
    config = replace(config, seed=seed)
    return Plan(config, dataset, seed, batches, count_evaluations(times))


def run(plan: Plan, inpainter: Inpainter) -> None:
    """Inpaint all images of the plan and write the results, and run.json beside them."""
    record = _RunRecord(plan, inpainter.diffusion.device)
    record.write()
    with _ProgressReport(plan) as report:
        for batch in plan.batches:
            start = time.monotonic()
            examples = [_load(plan, pair) for pair in batch]
            report.start_batch(batch)
            results = _inpaint(plan, inpainter, batch, examples, report)
            for pair, example, result in zip(batch, examples, results, strict=True):
                _write_outputs(plan.dataset, pair, example, result)
            record.add(batch, time.monotonic() - start)
    record.finish()


def _load(plan: Plan, pair: Pair) -> Example:
    flip = plan.dataset.random_flip and flip_decision(plan.seed, pair.index)
    return load_pair(pair, plan.config.network.image_size, flip)


def _inpaint(
    plan: Plan,
    inpainter: Inpainter,
    batch: Sequence[Pair],
    examples: Sequence[Example],
    report: "_ProgressReport",
) -> np.ndarray:
    """The results of a batch, uint8 (B, S, S, 3)."""
    gt = torch.stack([example.image for example in examples])
    keep_mask = torch.stack([example.keep_mask for example in examples])
    seeds = [plan.seed + pair.index for pair in batch]
    try:
        results = to_bytes(inpainter.sample(gt, keep_mask, seeds, report.evaluation_done))
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has not enough memory for {_counted(len(batch), 'image')} at a time; lower "
            f"data.eval.{plan.dataset.name}.batch_size, or set device: cpu"
        ) from error
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

    def __init__(self, plan: Plan, device: torch.device):
        self.path = plan.record_path
        self.seconds: dict[str, float] = {}
        self.content: dict[str, Any] = {
            "finished": False,
            "config": to_yaml_dict(plan.config),
            "seed": plan.seed,
            "device": str(device),
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

    def finish(self) -> None:
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


class _ProgressReport:
    """One bar over all evaluations of a run, and an early word on how long it will take."""

    warm_up = 1  # calls of the network that are not timed: the first is always slow
    timed = 4  # calls that the estimate is made from
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"

    def __init__(self, plan: Plan):
        self.show_bar = plan.config.show_progress
        self.images = plan.images
        self.total = plan.total_evaluations
        self.images_started = self.batch_size = 0
        self.calls = self.done = 0  # a call is one evaluation for each image of the batch
        self.timed_from = (0.0, 0)  # (seconds, evaluations done)

    def __enter__(self) -> "_ProgressReport":
        self.bar = tqdm(
            total=self.total,
            unit=" evaluations",
            disable=not self.show_bar,
            bar_format=self.bar_format,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def start_batch(self, batch: Sequence[Pair]) -> None:
        first, self.batch_size = self.images_started + 1, len(batch)
        self.images_started += len(batch)
        images = f"{first}" if len(batch) == 1 else f"{first}-{self.images_started}"
        self.bar.set_description(f"image {images} of {self.images}")

    def evaluation_done(self, done: int, total: int, pred_x0: torch.Tensor) -> None:
        self.bar.update(self.batch_size)
        self.calls += 1
        self.done += self.batch_size
        if self.calls == self.warm_up:
            self.timed_from = (_now(pred_x0), self.done)
        elif self.calls == self.warm_up + self.timed and self.done < self.total:
            self._announce(_now(pred_x0))

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


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
