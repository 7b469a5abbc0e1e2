"""One run, from the plan to the report. Knows an inpainter, not how it is made."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import count, takewhile
from typing import Any

import torch

from guided_diffusion.config import Config, UserError, to_yaml_dict
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.machine import memory, storage
from guided_diffusion.machine.ranks import Team
from guided_diffusion.machine.signals import Interrupted, StopSignals
from guided_diffusion.output.film import FilmLog
from guided_diffusion.output.report import Row, write_report
from guided_diffusion.run.plan import Plan, Task, companion_folders, counted, existing, region_name
from guided_diffusion.run.progress import ProgressReport
from guided_diffusion.run.recipe import Identity
from guided_diffusion.run.records import Records, writing
from guided_diffusion.run.worker import Worker, load, write, write_companions
from guided_diffusion.speed.choice import Speed


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
    with writing(records.path):
        records.begin(plan.run, plan.config.seed, identity.settings)
        records.set_aside(plan.run, plan.redo)
    _set_aside(plan)
    with writing(plan.report_path):
        storage.remove(plan.report_path)  # until it can show all
    _write_run_json(plan, identity)
    return {"batch_size": plan.batch_size, "digest": plan.digest}


def _batch_size(plan: Plan, inpainter: Inpainter) -> int:
    """The plan's; for `auto`, as many images as a GPU holds."""
    if plan.batch_size != "auto":
        return plan.batch_size
    first_step = replace(inpainter, times=(inpainter.times[0], inpainter.times[-1]))

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
                _forget_process(_process_log(plan), task.name)


def _forget_process(log: FilmLog, name: str) -> None:
    """Remove how a result was made, however many regions it had then. Raises OSError."""
    log.begin(name)
    regions = (region_name(name, k) for k in count())
    for region in takewhile(lambda region: storage.exists(log.animation(region)), regions):
        log.begin(region)


# ---- The batches ------------------------------------------------------------------------------


def _do_batches(
    plan: Plan, inpainter: Inpainter, speed: Speed, records: Records, team: Team
) -> int:
    """Inpaint the batches that this process gets; the batch size that memory sufficed for.

    On rank 0 it returns when all processes are done.
    """
    images, show_bar = sum(map(len, plan.batches)), plan.config.show_progress
    inputs = sum(task.inputs for batch in plan.batches for task in batch)
    with (
        ProgressReport(images, inputs * plan.evaluations, show_bar, team) as report,
        StopSignals(team.world.label) as stop,
    ):
        worker = Worker(
            plan=plan,
            inpainter=inpainter,
            speed=speed,
            records=records,
            team=team,
            report=report,
            stop=stop,
            log=_process_log(plan, inpainter) if plan.config.log_every else None,
            most=plan.batch_size,
        )
        try:
            worker.work()
        except Interrupted:  # torchrun interrupts all, and each has a state to save
            raise
        except Exception as error:
            team.stop(str(error))
            raise
    return worker.most


def _process_log(plan: Plan, inpainter: Inpainter | None = None) -> FilmLog:
    """inpainter: needed to write."""
    if inpainter is None:
        return FilmLog(plan.process_dir, every=1, times=(), noise_levels=())
    noise = (1 - inpainter.diffusion.alphas_cumprod) ** 0.5
    return FilmLog(plan.process_dir, plan.config.log_every, inpainter.times, noise.tolist())


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
    if not _exists(plan.report_path):
        _write_report(plan, identity, seconds)
    with writing(records.folder):
        records.forget_states()


def _restore_companions(plan: Plan) -> None:
    """Write anew what is missing of the pictures that need no network."""
    present = [existing(folder).keys() for folder in companion_folders(plan.dataset)]
    for task in plan.tasks:
        if task.is_first_sample and not all(task.pair.name in names for names in present):
            example = load(task, plan)
            write_companions(plan.dataset, task.pair.name, example)


# ---- Files ------------------------------------------------------------------------------------


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
    write(plan.record_path, f"{json.dumps(content, indent=2)}\n".encode())


def _write_report(plan: Plan, identity: Identity, seconds: dict[str, float]) -> None:
    """A page to look at the results. seconds: of each."""
    d, config = plan.dataset, plan.config
    facts = {
        "Model": config.model_path,
        "Images": f"{plan.images:,}",
        f"Evaluations per {plan.input_noun}": f"{plan.evaluations:,}",
        **({"Starts from": plan.start} if plan.start else {}),
        "Seed": f"{config.seed}",
        "Computed on": f"{identity.device}, {identity.speed.describe()}",
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
    path = _process_log(plan).animation(task.log_names[0])
    return path if plan.config.log_every and _exists(path) else None


def _exists(path: str) -> bool:
    with writing(path):
        return storage.exists(path)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "pillow")}
    # Unlike the package's, this one says for what it was built, such as +cpu or +cu130.
    return {"python": platform.python_version(), "torch": str(torch.__version__), **packages}
