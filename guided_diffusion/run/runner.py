"""One run, from the plan to the report. Knows an inpainter, not how it is made."""

from __future__ import annotations

import contextlib
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

import torch

from guided_diffusion.config import Config, UserError, to_yaml_dict
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.machine import memory, storage
from guided_diffusion.machine.signals import Interrupted, StopSignals
from guided_diffusion.run.plan import (
    Job,
    Plan,
    Task,
    companion_folders,
    counted,
    existing,
    region_name,
)
from guided_diffusion.run.progress import ProgressReport
from guided_diffusion.run.records import writing
from guided_diffusion.run.worker import Worker, load, write, write_companions

if TYPE_CHECKING:
    from guided_diffusion.output.film import FilmLog

WORTH_ASKING = 50  # evaluations of a run that is so long that a few more for a check do not matter


def run(job: Job, load_inpainter: Callable[[Config], Inpainter]) -> None:
    """Make what the plan has that is not done, together with the other ranks.

    Raises Interrupted after a signal, and UserError; what was written before is complete, and what
    was begun goes on in the next run.
    """
    team = job.team
    if not job.plan.is_done(job.plan.tasks):
        inpainter = load_inpainter(job.plan.config)
        job = job.settled(**team.share("settled plan", partial(_prepare, job, inpainter)))
        if team.is_first:
            team.world.say(job.describe())
            if not job.plan.done and job.plan.total_evaluations >= WORTH_ASKING:
                warn_of_doubts(job.plan, inpainter)
        with _at_work(job, inpainter) as worker:
            for batch in worker.batches():
                batch.results = worker.inpaint(batch)
        job = job.settled(batch_size=worker.most)
    if team.is_first:
        _finish(job)
        team.world.say(job.plan.describe_results())
    team.leave()


@contextlib.contextmanager
def _at_work(job: Job, inpainter: Inpainter) -> Iterator[Worker]:
    """What makes the batches of this rank; if it fails, it ends the other ranks too."""
    plan, team = job.plan, job.team
    images = sum(map(len, plan.batches))
    evaluations = plan.evaluations * sum(task.views for batch in plan.batches for task in batch)
    film = _film(plan, inpainter) if plan.config.log_every else None
    with (
        ProgressReport(images, evaluations, plan.config.show_progress, team) as report,
        StopSignals(team.world.label) as stop,
    ):
        try:
            yield Worker(job, inpainter, report, stop, film, most=plan.batch_size)
        except Interrupted:  # torchrun interrupts all, and each has a state to save
            raise
        except Exception as error:
            team.stop(str(error))
            raise


def warn_of_doubts(plan: Plan, inpainter: Inpainter) -> None:
    """Ask the network about the first picture, and warn if its settings are likely wrong."""
    task = next((task for task in plan.tasks if task.views), None)
    if task is None:
        return
    view = load(task, plan).view(0)
    try:
        doubt = inpainter.doubts(*view.square)
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        return memory.release()  # the run will say so, or make do with less
    if doubt:
        text = f"{plan.config.model_path}, asked about {task.pair.image_path}: {doubt}"
        warnings.warn(text, UserWarning, stacklevel=2)


# ---- Before the first batch -------------------------------------------------------------------


def _prepare(job: Job, inpainter: Inpainter) -> dict[str, Any]:
    """What rank 0 does once all is checked and the network is loaded; the first to write anything.

    Returns fields of the plan that are settled only now. Raises UserError.
    """
    plan, recipe, records = job.plan, job.recipe, job.records
    records.lock()
    if records.history().run >= plan.run:
        raise UserError(
            f"another run has just written to {plan.dataset.inpainted_dir}; run the same command "
            "again to go on from there"
        )
    settled = {"batch_size": _batch_size(plan, inpainter), "digest": recipe.digest}
    with writing(records.path):
        records.begin(plan.run, plan.config.seed, recipe.settings)
        records.set_aside(plan.run, plan.redo)
    _set_aside(plan)
    with writing(plan.report_path):
        storage.remove(plan.report_path)  # until it can show all
    _write_run_json(job.settled(**settled))
    return settled


def _batch_size(plan: Plan, inpainter: Inpainter) -> int:
    """The plan's; for `auto`, as many images as a GPU holds."""
    if plan.batch_size != "auto":
        return plan.batch_size
    first_step = inpainter.first_step()

    def evaluate(images: int) -> None:
        blank = torch.zeros(images, 3, *plan.largest_size)
        with contextlib.suppress(NonFiniteError):  # the run will tell, with the image's name
            first_step.sample(blank, blank, range(images))

    device = inpainter.diffusion.device
    return memory.measure_largest_batch(evaluate, device, most=len(plan.tasks))


def _set_aside(plan: Plan) -> None:
    """Take away the results that do not count any more, so that nothing stale has a final name."""
    for task in plan.tasks:
        if task.name in plan.redo:
            old = f"{plan.old_dir}/{task.name}"
            with writing(old):
                storage.move(f"{plan.dataset.inpainted_dir}/{task.name}", old)
                for folder in companion_folders(plan.dataset):
                    storage.remove(f"{folder}/{task.pair.name}")
                _forget_films(_film(plan), task.name)


def _forget_films(film: FilmLog, name: str) -> None:
    """Remove how a result was made, however many regions it had then. Raises OSError."""
    film.begin(name)
    regions = (region_name(name, number) for number in count())
    for region in takewhile(lambda region: storage.exists(film.animation(region)), regions):
        film.begin(region)


def _film(plan: Plan, inpainter: Inpainter | None = None) -> FilmLog:
    """inpainter: needed to write."""
    from guided_diffusion.output.film import FilmLog  # most runs show nothing of sampling

    if inpainter is None:
        return FilmLog(plan.film_dir, every=1, times=(), noise_words=())
    every, times = plan.config.log_every, inpainter.times
    return FilmLog(plan.film_dir, every, times, inpainter.noise_words)


# ---- After the last batch ---------------------------------------------------------------------


def _finish(job: Job) -> None:
    """What rank 0 does when all is done: look whether all is there, and say so in run.json.

    Raises UserError if something else has removed results meanwhile.
    """
    plan, records = job.plan, job.records
    _restore_companions(plan)
    history, sizes = records.history(), existing(plan.dataset.inpainted_dir)
    results = {task.name: history.results.get(task.name) for task in plan.tasks}
    missing = [
        name
        for name, result in results.items()
        if not (result and result.digest == job.recipe.digest and result.bytes == sizes.get(name))
    ]
    if missing:
        raise UserError(
            f"{counted(len(missing), 'result')} of {len(results)} went missing, first "
            f"{missing[0]}: something else changed {plan.dataset.inpainted_dir} or "
            f"{records.folder} meanwhile; run the same command again to make what is missing"
        )
    seconds = {name: result.seconds for name, result in results.items()}
    _write_run_json(job, seconds)
    if not _exists(plan.report_path):
        _write_report(job, seconds)
    with writing(records.folder):
        records.forget_states()


def _restore_companions(plan: Plan) -> None:
    """Write anew what is missing of the pictures that need no network."""
    present = [existing(folder).keys() for folder in companion_folders(plan.dataset)]
    for task in plan.tasks:
        if task.is_first_sample and not all(task.pair.name in names for names in present):
            write_companions(plan.dataset, task.pair.name, load(task, plan))


# ---- Files ------------------------------------------------------------------------------------


def _write_run_json(job: Job, seconds: dict[str, float] | None = None) -> None:
    """What was run, on what, and how long it took. seconds: of each result; None: not finished."""
    plan, recipe = job.plan, job.recipe
    content = {
        "finished": seconds is not None,
        "config": to_yaml_dict(plan.config),
        "seed": plan.config.seed,
        "device": str(recipe.device),
        "speed": asdict(recipe.speed),
        "batch_size": plan.batch_size,
        "versions": _versions(),
        "images": plan.images,
        "evaluations_per_image": plan.evaluations,
        "evaluations": plan.total_evaluations,
        "seconds_per_image": seconds or {},
        "checkpoints": list(recipe.checkpoints.values()),
    }
    write(plan.record_path, f"{json.dumps(content, indent=2)}\n".encode())


def _write_report(job: Job, seconds: dict[str, float]) -> None:
    """A page to look at the results. seconds: of each."""
    from guided_diffusion.output.report import Row, write_report  # nothing needs it before

    plan, recipe = job.plan, job.recipe
    d, config = plan.dataset, plan.config
    facts = {
        "Model": config.model_path,
        "Images": f"{plan.images:,}",
        f"Evaluations per {plan.view_noun}": f"{plan.evaluations:,}",
        **({"Starts from": plan.start} if plan.start else {}),
        "Seed": f"{config.seed}",
        "Computed on": f"{recipe.device}, {recipe.speed.describe()}",
    }
    samples: dict[str, list[Task]] = {}  # of each image, by its name, in the order of names
    for task in sorted(plan.tasks, key=lambda task: task.pair.index):
        samples.setdefault(task.pair.name, []).append(task)
    rows = (
        Row(
            name=name,
            input=d.gt_dir and f"{d.gt_dir}/{name}",
            masked=f"{d.gt_masked_dir}/{name}",
            results=tuple(f"{d.inpainted_dir}/{task.name}" for task in tasks),
            seconds=tuple(seconds[task.name] for task in tasks),
            seeds=tuple(task.origin.stream for task in tasks),
            process=_animation(plan, tasks[0]),
        )
        for name, tasks in samples.items()
    )
    with writing(plan.report_path):
        write_report(plan.report_path, config.name, facts, rows)


def _animation(plan: Plan, task: Task) -> str | None:
    """The path of a result's animation, if there is one; of a photo's first region."""
    if not plan.config.log_every:
        return None
    path = _film(plan).animation(task.film_names[0])
    return path if _exists(path) else None


def _exists(path: str) -> bool:
    with writing(path):
        return storage.exists(path)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "pillow")}
    # Unlike the package's, this one says for what it was built, such as +cpu or +cu130.
    return {"python": platform.python_version(), "torch": str(torch.__version__), **packages}
