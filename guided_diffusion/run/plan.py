"""The plan of a run: what there is to do, and what earlier runs have done of it."""

from __future__ import annotations

import math
import os
import random
import secrets
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from guided_diffusion.config import Config, DatasetConfig, UserError
from guided_diffusion.images.checks import Found, PairChecks
from guided_diffusion.images.pairs import Pair, PairFiles, for_each_pair, pair_up
from guided_diffusion.images.tensors import flip_decision
from guided_diffusion.machine import storage
from guided_diffusion.machine.ranks import Team, restarted
from guided_diffusion.run.recipe import Recipe
from guided_diffusion.run.records import History, Origin, Records, beside
from guided_diffusion.scheduler import count_evaluations, describe_levels, times_of
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
    views: int = 1  # of the picture: with fit: region, one a region
    windows: int = 0  # over the picture's holes, with fit: tile; of a finished one unknown: 0

    @property
    def film_names(self) -> list[str]:
        """Under which the film of each view is shown."""
        if self.views < 2:
            return [self.name]
        return [region_name(self.name, number) for number in range(self.views)]


@dataclass(frozen=True)
class Plan:
    """What a run will do, settled before any weight is loaded."""

    config: Config  # with the seed that will be used
    tasks: list[Task]  # in the order of work
    evaluations: int  # of the network, per view
    batch_size: int | Literal["auto"]  # to begin with; auto: still to be measured
    run: int  # a number that no earlier run of this folder has
    done: frozenset[str]  # names of results that are there already
    redo: dict[str, str]  # names of results that are there, but do not count, and why
    found: int  # images, also those that offset, max_len or drop_last leave out
    pairing: str  # how masks were found for images, in words; "": one serves all
    digest: str = ""  # of the settings; "": not yet settled

    @property
    def dataset(self) -> DatasetConfig:
        return self.config.dataset

    @property
    def images(self) -> int:
        return len({task.pair.index for task in self.tasks})

    @property
    def total_evaluations(self) -> int:
        """Of all views."""
        return self.views * self.evaluations

    @property
    def views(self) -> int:
        """Of all pictures."""
        return sum(task.views for task in self.tasks)

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
    def film_dir(self) -> str:
        """Where what is shown of sampling goes."""
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
            f"{self.config.name}: {self._share()} from {d.gt_path}, "
            f"masks from {d.mask_path}{self.pairing and f' ({self.pairing})'}{each}, "
            f"batch size {self.batch_size}{' (auto)' * measured}",
            f"{counted(self.evaluations, 'network evaluation')} per "
            f"{self.view_noun}, {self.total_evaluations:,} in all{self._regions()}",
            *self._windows(),
            *([describe_levels(self.config)] if self.config.langevin else []),
            *self._left_undone(),
            *([f"starts from {self.start}, not from pure noise"] if self.start else []),
            f"seed {seed} (to repeat this run: --set seed={seed})",
            f"device {device}, {speed.describe()}",
            *self._earlier_results(),
        ]
        return "\n".join(lines)

    def _left_undone(self) -> Iterator[str]:
        """What a reader of the config may believe in vain."""
        schedule, start = self.config.schedule, self.config.start_from
        if schedule and not any(u > t for t, u in pairwise(times_of(self.config))):
            steps = f"start_from.t is {start.t}" if start else f"t_T is {schedule.t_T}"
            few = f"{steps} and jump_length {schedule.jump_length}"
            why = "jump_n_sample is 1" if schedule.jump_n_sample == 1 else few
            yield f"nothing is resampled, as the schedule makes no jump: {why}"
        if self.config.unguided:
            yield f"no guidance: {self.config.unguided}"

    @property
    def start(self) -> str:
        """What sampling starts from in place of pure noise, in words; "" if it does not."""
        start = self.config.start_from
        return f"{start.path or 'the images themselves'}, noised to t = {start.t}" if start else ""

    def _share(self) -> str:
        """How many images there are to make, and of how many."""
        all_of_them = counted(self.found, "image")
        return all_of_them if self.images == self.found else f"{self.images:,} of {all_of_them}"

    def _regions(self) -> str:
        if self.dataset.fit != "region":
            return ""
        return f" for {counted(self.views, 'region')}"

    def _windows(self) -> Iterator[str]:
        windows, side = sum(task.windows for task in self.tasks), self.config.image_size
        if windows:
            yield (
                f"{counted(windows, 'window')} of {side}x{side} over the holes, in each evaluation "
                f"of its image: {windows * self.evaluations:,} windows to compute"
            )

    @property
    def view_noun(self) -> str:
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

    Those of a size come together, because layers and graphs are made ready anew when it changes.
    """
    alike: dict[tuple[int, int] | None, list[Task]] = {}
    for task in tasks:
        alike.setdefault(task.size, []).append(task)
    return [
        of_size[first : first + batch_size]
        for of_size in alike.values()
        for first in range(0, len(of_size), batch_size)
    ]


def region_name(name: str, number: int) -> str:
    """Of a region of a picture, counted from 0: "x_region1.png"."""
    return f"{name.removesuffix('.png')}_region{number + 1}.png"


def stream_of_view(stream: int, number: int) -> int:
    """The seed for a view of a picture; that of view 0 is the picture's own."""
    if number == 0:
        return stream
    return int(np.random.SeedSequence((stream, number)).generate_state(1, np.uint64)[0]) >> 2


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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
    recipe.start_hashing()
    pairing = pair_up(
        dataset.gt_path, dataset.mask_path, dataset.offset, dataset.max_len, config.start_path
    )
    pairs = pairing.pairs
    for folder in [dataset.inpainted_dir, *companion_folders(dataset)]:
        advice = "change `paths` in the config, or the folder's permissions"
        with storage.writing(f"in the output folder {folder}", advice):
            storage.check_writable(folder)
    if not dry_run and storage.is_dir(records.folder):
        records.lock()
    history = records.history()
    config = replace(config, seed=_seed(config, history, overwrite))
    if not dataset.deterministic:
        random.Random(config.seed).shuffle(pairs)
    size = dataset.batch_size
    if dataset.fit == "tile" or (size == "auto" and recipe.device.type != "cuda"):
        size = 1  # windows are a batch; or larger batches are hardly faster
    earlier = _Earlier(existing(dataset.inpainted_dir), history, recipe, overwrite)
    tasks = _look_through(pairs, config, earlier)
    if dataset.drop_last:
        tasks = _whole_batches(tasks, size, config.source)
    _warn_of_others(earlier.sizes.keys() - {task.name for task in tasks}, dataset.inpainted_dir)
    reasons = {task.name: earlier.why_again(task) for task in tasks}
    plan = Plan(
        config=config,
        tasks=tasks,
        evaluations=count_evaluations(times),
        batch_size=size,
        run=history.run + 1,
        done=frozenset(name for name, reason in reasons.items() if reason == ""),
        redo={name: reason for name, reason in reasons.items() if reason},
        found=pairing.images,
        pairing=pairing.rule,
    )
    _check_names(plan)
    return plan


def _check_names(plan: Plan) -> None:
    """Raises UserError where the file system has no room for the name of what a run writes."""
    room = cache(storage.name_limit)
    for task in plan.tasks:
        for folder, name in _written(plan, task):
            longest = max(map(storage.name_length, name.split("/")))
            if longest > room(folder):
                raise UserError(
                    f"the name of {task.pair.image_path} is too long: one that is made of it would "
                    f"have {longest} bytes, and in {folder} at most {room(folder)} fit; rename the "
                    "image"
                )


def _written(plan: Plan, task: Task) -> Iterator[tuple[str, str]]:
    """Folder and name of the files that a run makes of a task, but for those of fixed names."""
    yield plan.dataset.inpainted_dir, task.name
    yield from ((folder, task.pair.name) for folder in companion_folders(plan.dataset))
    if plan.config.log_every:
        from guided_diffusion.output.film import FilmLog  # most runs show nothing of sampling

        film = FilmLog("", every=1, times=(), noise_words=())
        yield from ((plan.film_dir, film.animation(name)) for name in task.film_names)


def _seed(config: Config, history: History, overwrite: bool) -> int:
    """The config's, or that with which an earlier run began, or a fresh one."""
    if config.seed is not None:
        return config.seed
    if history.seed is not None and not overwrite:
        return history.seed
    return secrets.randbelow(MAX_SEED)


def _look_through(pairs: Sequence[Pair], config: Config, earlier: _Earlier) -> list[Task]:
    """What there is to make of these pairs; each file is read once, and checked if it is needed.

    Raises UserError for files that cannot be read, or do not go together.
    """
    checks = PairChecks(config.dataset, config.image_size, config.known_from)

    def look(pair: Pair, files: PairFiles) -> tuple[list[Task], Found | UserError | None]:
        try:
            tasks = _tasks_of(pair, files, config)
        except UserError as error:
            return [], error
        finished = all(earlier.why_again(task) == "" for task in tasks)
        return tasks, None if finished else checks.inspect(files)

    looked = for_each_pair(pairs, look)
    checks.report({pair: found for pair, (_, found) in looked.items() if found})
    return [
        replace(task, views=found.mask.views, windows=found.mask.windows)
        if found
        else replace(task, views=earlier.history.results[task.name].views)
        for tasks, found in looked.values()
        for task in tasks
    ]


def _tasks_of(pair: Pair, files: PairFiles, config: Config) -> list[Task]:
    """One for each sample. Raises UserError where the image has no size."""
    samples, seed = config.samples_per_image, config.seed
    size = files.image.size() if config.image_size is None else None
    return [
        Task(
            pair,
            pair.name if samples == 1 else f"{pair.name.removesuffix('.png')}_{sample}.png",
            Origin(
                stream=seed + pair.index + sample * STREAMS,
                flip=config.dataset.random_flip and flip_decision(seed, pair.index),
                image=files.image.digest,
                mask=files.mask.digest,
                start=files.start and files.start.digest,
            ),
            is_first_sample=sample == 0,
            size=size,
        )
        for sample in range(samples)
    ]


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


class _Earlier:
    """What earlier runs have made, and whether it counts."""

    def __init__(self, sizes: dict[str, int], history: History, recipe: Recipe, overwrite: bool):
        """sizes: in bytes, of the results that are there, by name. overwrite: none counts."""
        self.sizes, self.history, self.overwrite = sizes, history, overwrite
        self.differences = cache(lambda digest: history.differences(digest, recipe.settings))

    def why_again(self, task: Task) -> str | None:
        """Why a result is made again; "" if it counts, None if there is none. Raises UserError."""
        if task.name not in self.sizes:
            return None
        if self.overwrite:
            return "--overwrite was given"
        result = self.history.results.get(task.name)
        if result is None:
            return "it is not known how it was made"
        if result.bytes != self.sizes[task.name]:
            return "its file was changed by something else"
        return self.differences(result.digest) or result.origin.differences(task.origin)


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


# ---- For all ranks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A plan, and what it takes to carry it out besides a network."""

    plan: Plan
    recipe: Recipe
    records: Records
    team: Team

    def settled(self, **fields: Any) -> Job:
        """With these fields of the plan."""
        return replace(self, plan=replace(self.plan, **fields))

    def describe(self) -> str:
        """A few lines for people."""
        return self.plan.describe(self.recipe.device, self.recipe.speed)


def make_job(
    config: Config,
    times: Sequence[int],
    recipe: Recipe,
    team: Team,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Job:
    """The job of this rank; rank 0 makes the plan for all, see `make_plan`. Raises UserError.

    overwrite: does not count for ranks that torchrun has started again. dry_run: each rank makes
    a plan of its own.
    """
    overwrite = overwrite and not restarted()
    records = Records(config.dataset.inpainted_dir, team.world.rank)
    make = partial(make_plan, config, times, recipe, records, overwrite=overwrite, dry_run=dry_run)
    plan = make() if dry_run else team.share("plan", make, to_json, partial(from_json, config))
    return Job(plan, recipe, records, team)


def to_json(plan: Plan) -> dict[str, Any]:
    """What another rank needs of a plan; of the config, that is its seed."""
    content = asdict(replace(plan, config=None))
    return content | {"config": plan.config.seed, "done": sorted(plan.done)}


def from_json(config: Config, content: dict[str, Any]) -> Plan:
    """The plan that `to_json` was given. config: as it was loaded."""
    return Plan(
        **content
        | {
            "config": replace(config, seed=content["config"]),
            "tasks": [_task_from_json(task) for task in content["tasks"]],
            "done": frozenset(content["done"]),
        }
    )


def _task_from_json(content: dict[str, Any]) -> Task:
    pair, origin = Pair(**content["pair"]), Origin(**content["origin"])
    size = content["size"] and tuple(content["size"])
    return Task(**content | {"pair": pair, "origin": origin, "size": size})
