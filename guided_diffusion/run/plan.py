"""The plan of a run: what there is to do, and what earlier runs have done of it."""

from __future__ import annotations

import math
import os
import random
import secrets
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch

from guided_diffusion.config import Config, DatasetConfig, UserError
from guided_diffusion.images.checks import check_pairs, inspected
from guided_diffusion.images.files import read_size
from guided_diffusion.images.pairs import Pair, find_pairs, for_each
from guided_diffusion.images.tensors import flip_decision
from guided_diffusion.machine import storage
from guided_diffusion.machine.ranks import Team
from guided_diffusion.run.recipe import Recipe
from guided_diffusion.run.records import History, Origin, Records, beside
from guided_diffusion.scheduler import count_evaluations
from guided_diffusion.speed.choice import Speed

MAX_SEED = 2**31 - 1  # of seeds drawn afresh: short enough to type
STREAMS = 2**32  # the seeds of an image's samples are so far apart


@dataclass(frozen=True)
class Task:
    """One picture to make."""

    pair: Pair
    name: str  # of the result, relative to its folder
    origin: Origin
    is_first_sample: bool  # of its image
    size: tuple[int, int] | None = None  # height and width; None: the square of image_size
    inputs: int = 1  # of the network: with fit: region, one a region

    @property
    def log_names(self) -> list[str]:
        """Under which the process of each input is shown."""
        if self.inputs < 2:
            return [self.name]
        return [region_name(self.name, k) for k in range(self.inputs)]


@dataclass(frozen=True)
class Plan:
    """What a run will do, settled before any weight is loaded."""

    config: Config  # with the seed that will be used
    tasks: list[Task]  # in the order of work
    evaluations: int  # of the network, per input
    batch_size: int | Literal["auto"]  # to begin with; auto: still to be measured
    run: int  # a number that no earlier run of this folder has
    done: frozenset[str]  # names of results that are there already
    redo: dict[str, str]  # names of results that are there, but do not count, and why
    digest: str = ""  # of the settings; "": not yet settled

    @property
    def dataset(self) -> DatasetConfig:
        return self.config.dataset

    @property
    def images(self) -> int:
        return len({task.pair.index for task in self.tasks})

    @property
    def total_evaluations(self) -> int:
        """One for each input of the network."""
        return sum(task.inputs for task in self.tasks) * self.evaluations

    @cached_property
    def batches(self) -> list[list[Task]]:
        """What is still to be computed.

        A batch is made up as in a run that starts afresh, since pixels depend on it in their last
        bit. Of one that is done in part, all is computed again.
        """
        batches = make_batches(self.tasks, self.batch_size)
        return [batch for batch in batches if not self.is_done(batch)]

    @property
    def largest_size(self) -> tuple[int, int]:
        """Height and width of the largest picture that the network is still to see."""
        side = self.config.image_size
        missing = (task for task in self.tasks if task.name not in self.done)
        return max((task.size or (side, side) for task in missing), key=math.prod)

    def is_done(self, tasks: Sequence[Task]) -> bool:
        """Whether earlier runs have finished all of these."""
        return all(task.name in self.done for task in tasks)

    @property
    def record_path(self) -> str:
        """Where run.json goes."""
        return self._beside_results("run.json")

    @property
    def report_path(self) -> str:
        """Where the report goes."""
        return self._beside_results("report.html")

    @property
    def process_dir(self) -> str:
        """Where pictures of the process go."""
        return self._beside_results("process")

    def _beside_results(self, name: str) -> str:
        log_dir = os.path.dirname(self.dataset.inpainted_dir.rstrip("/"))
        return f"{log_dir}/{name}" if log_dir else name

    @property
    def old_dir(self) -> str:
        """Where earlier results go that do not count any more."""
        return beside(self.dataset.inpainted_dir, ".old")

    def describe(self, device: torch.device, speed: Speed) -> str:
        """A few lines for people."""
        d, seed, samples = self.dataset, self.config.seed, self.config.samples_per_image
        measured = d.batch_size == "auto" and self.batch_size != "auto"
        each = f", {samples} samples of each" if samples > 1 else ""
        lines = [
            f"{self.config.name}: {counted(self.images, 'image')} from {d.gt_path}, "
            f"masks from {d.mask_path}{each}, "
            f"batch size {self.batch_size}{' (auto)' * measured}",
            f"{counted(self.evaluations, 'network evaluation')} per "
            f"{self.input_noun}, {self.total_evaluations:,} in all{self._regions()}",
            *([f"starts from {self.start}, not from pure noise"] if self.start else []),
            f"seed {seed} (to repeat this run: --set seed={seed})",
            f"device {device}, {speed.describe()}",
            *self._earlier_results(),
        ]
        return "\n".join(lines)

    @property
    def start(self) -> str:
        """What sampling starts from in place of pure noise, in words; "" if it does not."""
        start = self.config.start_from
        return f"{start.path or 'the images themselves'}, noised to t = {start.t}" if start else ""

    def _regions(self) -> str:
        if self.dataset.fit != "region":
            return ""
        return f" for {counted(sum(task.inputs for task in self.tasks), 'region')}"

    @property
    def input_noun(self) -> str:
        """What one run of the sampler is for."""
        if self.dataset.fit == "region":
            return "region"
        return "sample" if self.config.samples_per_image > 1 else "image"

    def describe_results(self) -> str:
        """Where everything is."""
        unchanged = "all were finished before (--overwrite makes them again); "
        return unchanged * self.is_done(self.tasks) + (
            f"results: {self.dataset.inpainted_dir} (settings and times: {self.record_path})\n"
            f"to look at: {self.report_path}"
        )

    def _earlier_results(self) -> Iterator[str]:
        if self.done:
            yield (
                f"{len(self.done)} of {len(self.tasks)} are finished and skipped "
                "(--overwrite does them again)"
            )
        if self.redo:
            first, reason = next(iter(self.redo.items()))
            others = len(set(self.redo.values())) - 1
            more = f" (and {counted(others, 'other reason')})" if others else ""
            yield (
                f"{len(self.redo)} of {len(self.tasks)} were made before and are done again, "
                f"first {first}: {reason}{more}; earlier results go to {self.old_dir}"
            )


def make_batches(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Tasks in batches of pictures of one size; sizes follow in the order of their first pictures.

    Those of a size come together, for layers and graphs are made ready anew whenever it changes.
    """
    alike: dict[tuple[int, int] | None, list[Task]] = {}
    for task in tasks:
        alike.setdefault(task.size, []).append(task)
    return [
        of_size[first : first + batch_size]
        for of_size in alike.values()
        for first in range(0, len(of_size), batch_size)
    ]


def region_name(name: str, k: int) -> str:
    """Of the k-th region of a picture: "x_region1.png"."""
    return f"{name.removesuffix('.png')}_region{k + 1}.png"


def stream_of_view(stream: int, k: int) -> int:
    """The seed for the k-th view of a picture; that of the first is the picture's own."""
    if k == 0:
        return stream
    return int(np.random.SeedSequence((stream, k)).generate_state(1, np.uint64)[0]) >> 2


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# ---- What the pixels follow from --------------------------------------------------------------


# ---- Planning ---------------------------------------------------------------------------------


def make_plan(
    config: Config,
    times: Sequence[int],
    recipe: Recipe,
    records: Records,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Pair and check all inputs and outputs, and look what is done. Raises UserError.

    overwrite: no earlier result counts. dry_run: another run may be at work meanwhile.
    """
    dataset = config.dataset
    if dataset is None:
        raise UserError(f"{config.source}: data.eval: missing; name one dataset")
    recipe.start_hashing()
    pairs = find_pairs(
        dataset.gt_path, dataset.mask_path, dataset.offset, dataset.max_len, config.start_path
    )
    for folder in [dataset.inpainted_dir, *companion_folders(dataset)]:
        _check_output_folder(folder)
    if not dry_run and storage.is_dir(records.folder):
        records.lock()
    history = records.history()
    seed = _seed(config, history, overwrite)
    if not dataset.deterministic:
        random.Random(seed).shuffle(pairs)
    size = dataset.batch_size
    if size == "auto" and recipe.device.type != "cuda":
        size = 1  # elsewhere, larger batches are hardly faster
    tasks = _make_tasks(replace(config, seed=seed), pairs)
    if dataset.drop_last:
        tasks = _whole_batches(tasks, size, config.source)
    done, redo = _earlier_results(tasks, dataset, history, recipe, overwrite)
    plan = Plan(
        config=replace(config, seed=seed),
        tasks=tasks,
        evaluations=count_evaluations(times),
        batch_size=size,
        run=history.run + 1,
        done=done,
        redo=redo,
    )
    return _checked(plan, history)


def _checked(plan: Plan, history: History) -> Plan:
    """The plan, with the inputs of the network counted. Raises UserError for what is to be done."""
    missing = [task for task in plan.tasks if task.name not in plan.done]
    pairs = [task.pair for task in missing]
    config = plan.config
    counts = check_pairs(pairs, plan.dataset, config.image_size, config.known_from)
    inputs = {name: history.results[name].inputs for name in plan.done}
    inputs |= {task.name: count for task, count in zip(missing, counts, strict=True)}
    return replace(plan, tasks=[replace(task, inputs=inputs[task.name]) for task in plan.tasks])


def _seed(config: Config, history: History, overwrite: bool) -> int:
    """The config's, or that with which an earlier run began, or a fresh one."""
    if config.seed is not None:
        return config.seed
    if history.seed is not None and not overwrite:
        return history.seed
    return secrets.randbelow(MAX_SEED)


def _make_tasks(config: Config, pairs: Sequence[Pair]) -> list[Task]:
    """Raises UserError for a file that cannot be read."""
    paths = (
        path
        for pair in pairs
        for path in (pair.image_path, pair.mask_path, pair.start_path)
        if path
    )
    digest = for_each(paths, input_digest)
    images = [pair.image_path for pair in pairs]
    sizes = inspected(images, read_size) if config.image_size is None else {}
    samples, seed = config.samples_per_image, config.seed
    return [
        Task(
            pair,
            pair.name if samples == 1 else f"{pair.name.removesuffix('.png')}_{sample}.png",
            Origin(
                stream=seed + pair.index + sample * STREAMS,
                flip=config.dataset.random_flip and flip_decision(seed, pair.index),
                image=digest[pair.image_path],
                mask=digest[pair.mask_path],
                start=pair.start_path and digest[pair.start_path],
            ),
            is_first_sample=sample == 0,
            size=sizes.get(pair.image_path),
        )
        for pair in pairs
        for sample in range(samples)
    ]


def input_digest(path: str) -> str:
    """SHA-256 of an image or a mask. Raises UserError."""
    try:
        return storage.file_digest(path)[1]
    except OSError as error:
        raise UserError(
            f"cannot read image {path}: {error.strerror or error}; replace or remove the file"
        ) from error


def _whole_batches(tasks: list[Task], batch_size: int, source: str) -> list[Task]:
    batches = make_batches(tasks, batch_size)
    kept = {task.name for batch in batches if len(batch) == batch_size for task in batch}
    if not kept:
        most, alike = max(map(len, batches)), " of one size" if tasks[0].size else ""
        raise UserError(
            f"{source}: drop_last leaves no batch: there are {most} image(s){alike}, fewer than "
            f"batch_size {batch_size}; set drop_last: false"
        )
    return [task for task in tasks if task.name in kept]


def _earlier_results(
    tasks: Sequence[Task],
    dataset: DatasetConfig,
    history: History,
    recipe: Recipe,
    overwrite: bool,
) -> tuple[frozenset[str], dict[str, str]]:
    """Names of the results that count, and of those that are there but do not, with reasons."""
    sizes = existing(dataset.inpainted_dir)
    _warn_of_others(sizes.keys() - {task.name for task in tasks}, dataset.inpainted_dir)
    done, redo = set(), {}
    differences = cache(lambda digest: history.differences(digest, recipe.settings))
    for task in tasks:
        if task.name not in sizes:
            continue
        result = history.results.get(task.name)
        if overwrite:
            redo[task.name] = "--overwrite was given"
        elif result is None:
            redo[task.name] = "it is not known how it was made"
        elif result.bytes != sizes[task.name]:
            redo[task.name] = "its file was changed by something else"
        elif reason := differences(result.digest) or result.origin.differences(task.origin):
            redo[task.name] = reason
        else:
            done.add(task.name)
    return frozenset(done), redo


def _warn_of_others(names: Set[str], folder: str) -> None:
    if names:
        warnings.warn(
            f"{counted(len(names), 'file')} in {folder} would not be made by this run, first "
            f"{min(names)}; left as they are",
            UserWarning,
            stacklevel=2,
        )


def existing(folder: str) -> dict[str, int]:
    """Name, relative to the folder, and size of each file in it. Raises UserError."""
    root = folder.rstrip("/")
    try:
        return {path[len(root) + 1 :]: size for path, size in storage.list_sizes(root).items()}
    except OSError as error:
        raise UserError(
            f"cannot read the output folder {folder}: {error.strerror or error}"
        ) from error


def companion_folders(d: DatasetConfig) -> list[str]:
    """Where the pictures go that are written beside each result."""
    folders = (d.gt_masked_dir, d.keep_mask_dir, d.gt_dir)
    return [folder for folder in folders if folder is not None]


def _check_output_folder(folder: str) -> None:
    try:
        storage.check_writable(folder)
    except OSError as error:
        raise UserError(
            f"cannot write in the output folder {folder}: {error.strerror or error}; change "
            "`paths` in the config, or the folder's permissions"
        ) from error


# ---- For other processes ----------------------------------------------------------------------


def share_plan(
    team: Team,
    config: Config,
    times: Sequence[int],
    recipe: Recipe,
    records: Records,
    overwrite: bool,
) -> Plan:
    """The plan that rank 0 makes, in every process. Raises UserError."""
    return team.share(
        "plan",
        lambda: make_plan(config, times, recipe, records, overwrite=overwrite),
        to_json,
        lambda content: from_json(config, content),
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """What another process needs of a plan, besides the config."""
    content = {field.name: getattr(plan, field.name) for field in fields(plan)}
    del content["config"]
    return content | {
        "seed": plan.config.seed,
        "tasks": [asdict(task) for task in plan.tasks],
        "done": sorted(plan.done),
    }


def from_json(config: Config, content: dict[str, Any]) -> Plan:
    """The plan that `to_json` was given. config: as it was loaded."""
    fields = dict(content)
    fields["config"] = replace(config, seed=fields.pop("seed"))
    fields["tasks"] = [
        Task(
            **task
            | {
                "pair": Pair(**task["pair"]),
                "origin": Origin(**task["origin"]),
                "size": task["size"] and tuple(task["size"]),
            }
        )
        for task in fields["tasks"]
    ]
    fields["done"] = frozenset(fields["done"])
    return Plan(**fields)
