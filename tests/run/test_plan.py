"""The plan of a run: which pictures, from which random numbers, and which of them are done."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from guided_diffusion.config import UserError
from guided_diffusion.images.checks import PairChecks
from guided_diffusion.images.tensors import flip_decision
from guided_diffusion.machine import storage
from guided_diffusion.machine.ranks import Team, World
from guided_diffusion.run import plan as planning
from guided_diffusion.run import recipe as recipes
from guided_diffusion.run.plan import Plan, from_json, make_job, make_plan, to_json
from guided_diffusion.speed.choice import Speed
from tests.support.plans import CPU, NAMES, SEED, SIZE, TIMES, Case, names, names_in_batches


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


# ---- The pictures of a run that starts afresh ----


def test_a_fresh_plan(case):
    before = case.tree() | {case.path / "conf.yml"}
    plan = case.plan()
    assert case.tree() == before  # it writes nothing
    assert names(plan) == list(NAMES)
    assert (plan.images, plan.evaluations, plan.total_evaluations) == (5, 10, 50)
    assert (plan.run, plan.done, plan.redo, plan.digest) == (1, frozenset(), {}, "")
    assert names_in_batches(plan) == [[name] for name in NAMES]
    assert all(task.is_first_sample for task in plan.tasks)


def test_where_everything_goes(case):
    for slash in ("", "/"):
        case.dataset["paths"]["srs"] = f"{case.results}{slash}"
        plan = case.plan()
        assert plan.record_path == f"{case.path}/out/run.json"
        assert plan.old_dir == f"{case.path}/out/results.old"


def test_several_samples_of_an_image_have_numbered_names_and_follow_one_another(case):
    case.keys["samples_per_image"] = 3
    case.dataset["batch_size"] = 4
    plan = case.plan()
    assert names(plan) == [f"{name[:-4]}_{sample}.png" for name in NAMES for sample in range(3)]
    assert names(plan)[6:9] == ["sub/c_0.png", "sub/c_1.png", "sub/c_2.png"]
    assert [task.is_first_sample for task in plan.tasks] == [True, False, False] * 5
    assert [task.pair.name for task in plan.tasks] == [name for name in NAMES for _ in range(3)]
    assert (plan.images, plan.total_evaluations) == (5, 150)
    assert [len(batch) for batch in plan.batches] == [4, 4, 4, 3]
    assert names_in_batches(plan)[0] == ["a_0.png", "a_1.png", "a_2.png", "b_0.png"]


def test_each_sample_has_a_stream_of_its_own(case):
    case.keys["samples_per_image"] = 3
    streams = {task.name: task.origin.stream for task in case.plan().tasks}
    assert streams == {
        f"{name[:-4]}_{sample}.png": SEED + i + sample * 2**32
        for i, name in enumerate(NAMES)
        for sample in range(3)
    }


def test_one_sample_has_the_stream_of_the_seed_and_its_place(case):
    case.dataset |= {"offset": 1, "max_len": 3}
    streams = {task.name: task.origin.stream for task in case.plan().tasks}
    assert streams == {"b.png": SEED, "sub/c.png": SEED + 1, "sub/d.png": SEED + 2}


def test_a_shuffled_order_takes_stream_and_flip_along(case):
    case.dataset["random_flip"] = True
    in_order = case.plan()
    case.dataset["deterministic"] = False
    shuffled = case.plan()
    assert names(shuffled) != names(in_order)
    assert {t.name: t for t in shuffled.tasks} == {t.name: t for t in in_order.tasks}
    assert names(case.plan()) == names(shuffled)  # the seed decides


def test_flips_are_drawn_from_the_seed(case):
    assert not any(task.origin.flip for task in case.plan().tasks)
    case.dataset["random_flip"] = True
    case.keys["samples_per_image"] = 2
    flips = [task.origin.flip for task in case.plan().tasks]
    assert flips == [flip_decision(SEED, i) for i in range(5) for _ in range(2)]
    assert len(set(flips)) == 2


def test_the_digests_are_those_of_the_files(case):
    def sha256(kind: str, name: str) -> str:
        return hashlib.sha256((case.path / kind / name).read_bytes()).hexdigest()

    for task in case.plan().tasks:
        assert task.origin.image == sha256("gts", task.name)
        assert task.origin.mask == sha256("masks", task.name)


def test_a_mask_for_all_images_is_read_once(case):
    case.dataset["mask_path"] = str(case.path / "masks" / "b.png")
    with patch.object(storage, "open_binary", wraps=storage.open_binary) as opened:
        plan = case.plan()
    paths = [call.args[0] for call in opened.call_args_list]
    assert len([path for path in paths if "/masks/" in path]) == 1
    assert len({task.origin.mask for task in plan.tasks}) == 1


def test_only_whole_batches_of_samples_are_kept(case):
    case.keys["samples_per_image"] = 2
    case.dataset |= {"batch_size": 4, "drop_last": True}
    assert [len(batch) for batch in case.plan().batches] == [4, 4]
    assert case.plan().total_evaluations == 80


# ---- What is done ----


def test_what_is_finished_is_done(case):
    case.finish()
    plan = case.plan()
    assert (plan.run, plan.done, plan.redo) == (2, frozenset(NAMES), {})
    assert plan.batches == [] and plan.is_done(plan.tasks)


@pytest.mark.parametrize(
    ("done", "batches"),
    [
        ((), [[0, 1], [2, 3], [4]]),
        ((0, 1), [[2, 3], [4]]),
        ((0, 2), [[0, 1], [2, 3], [4]]),
        ((1, 2, 3), [[0, 1], [4]]),
        ((4,), [[0, 1], [2, 3]]),
        ((0, 1, 2, 4), [[2, 3]]),
    ],
)
def test_batches_are_made_up_as_in_a_fresh_run(case, done, batches):
    case.dataset["batch_size"] = 2
    case.finish([NAMES[i] for i in done])
    plan = case.plan()
    assert plan.done == {NAMES[i] for i in done}
    assert names_in_batches(plan) == [[NAMES[i] for i in batch] for batch in batches]


def test_samples_that_are_missing_are_computed_in_their_batch(case):
    case.keys["samples_per_image"] = 2
    case.dataset["batch_size"] = 3
    case.finish()
    (case.results / "b_1.png").unlink()
    plan = case.plan()
    assert names_in_batches(plan) == [["b_1.png", "sub/c_0.png", "sub/c_1.png"]]
    assert len(plan.done) == 9 and plan.redo == {}


def test_only_what_is_to_be_done_is_checked(case):
    case.finish(NAMES[:3])
    with patch.object(PairChecks, "report", autospec=True) as report:
        case.plan()
    ((_, found), _) = report.call_args
    assert [pair.name for pair in found] == list(NAMES[3:])


def _write(path: str, content: bytes) -> Callable[[Case], object]:
    return lambda case: (case.path / path).write_bytes(content)


def _copy(source: str, target: str) -> Callable[[Case], object]:
    return lambda case: shutil.copy(case.path / source, case.path / target)


def _forget(case: Case) -> None:
    """Lose the record of sub/c.png."""
    path = Path(case.records.path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "sub/c.png" not in line))


def _set(**keys: object) -> Callable[[Case], object]:
    return lambda case: case.keys.update(keys)


def _set_dataset(**keys: object) -> Callable[[Case], object]:
    return lambda case: case.dataset.update(keys)


def _move_inputs(case: Case) -> None:
    for key, kind in (("gt_path", "gts"), ("mask_path", "masks")):
        (case.path / kind).rename(case.path / f"{kind}-moved")
        case.dataset[key] = str(case.path / f"{kind}-moved")
    (case.path / "weights.pt").rename(case.path / "moved.pt")
    case.keys["model_path"] = str(case.path / "moved.pt")


FLIPPED = [name for i, name in enumerate(NAMES) if flip_decision(SEED, i)]
SOME: dict[str, tuple[Callable[[Case], object], dict[str, str]]] = {
    "another image": (_copy("gts/a.png", "gts/b.png"), {"b.png": "the image changed"}),
    "another mask": (_copy("masks/a.png", "masks/z.png"), {"z.png": "the mask changed"}),
    "a shorter file": (
        _write("out/results/sub/d.png", b"pict"),
        {"sub/d.png": "its file was changed by something else"},
    ),
    "an empty file": (
        _write("out/results/a.png", b""),
        {"a.png": "its file was changed by something else"},
    ),
    "no record": (_forget, {"sub/c.png": "it is not known how it was made"}),
    "flips": (_set_dataset(random_flip=True), dict.fromkeys(FLIPPED, "random_flip changed")),
    "another seed": (
        _set(seed=101),
        {name: "the seed changed, or its place among the images" for i, name in enumerate(NAMES)},
    ),
}


@pytest.mark.parametrize("change", SOME)
def test_what_does_not_count_any_more_is_done_again(case, change):
    case.finish()
    spoil, expected = SOME[change]
    spoil(case)
    plan = case.plan()
    assert expected and plan.redo == expected
    assert plan.done == set(NAMES) - set(expected)
    case.finish()
    assert case.plan().done == set(NAMES)


def test_a_result_that_is_gone_is_made_again_without_a_word(case):
    case.finish()
    (case.results / "b.png").unlink()
    plan = case.plan()
    assert plan.done == set(NAMES) - {"b.png"} and plan.redo == {}
    assert names_in_batches(plan) == [["b.png"]]


def test_a_new_image_is_made_and_what_moves_down_is_done_again(case):
    case.finish()
    for kind in ("gts", "masks"):
        shutil.copy(case.path / kind / "a.png", case.path / kind / "sub" / "cc.png")
    plan = case.plan()
    assert plan.done == {"a.png", "b.png", "sub/c.png"}
    assert plan.redo == {
        "sub/d.png": "the seed changed, or its place among the images",
        "z.png": "the seed changed, or its place among the images",
    }
    assert names_in_batches(plan) == [["sub/cc.png"], ["sub/d.png"], ["z.png"]]


SCHEDULE = {"t_T": 10, "n_sample": 1, "jump_length": 2, "jump_n_sample": 2}
ALL: dict[str, tuple[Callable[[Case], object], str]] = {
    "t_T": (
        _set(schedule_jump_params=SCHEDULE | {"t_T": 9}),
        "schedule_jump_params.t_T was 10, is 9",
    ),
    "paste_known": (_set(paste_known=True), "paste_known was at its default, is true"),
    "class": (_set(cond_y=3), "cond_y was at its default, is 3"),
    "respacing": (_set(timestep_respacing="20"), "timestep_respacing was 10, is 20"),
    "injection": (
        _set(inpa_inj_sched_prev=False),
        "inpa_inj_sched_prev was at its default, is false",
    ),
    "fit": (_set_dataset(fit="region"), "fit was at its default, is region"),
    "convention": (
        _set_dataset(mask_convention="fill"),
        "mask_convention was at its default, is fill",
    ),
    "clipping": (_set(clip_denoised=False), "clip_denoised was at its default, is false"),
    "DDIM": (_set(use_ddim=True), "use_ddim was at its default, is true"),
    "its noise": (
        _set(use_ddim=True, ddim_eta=0.5),
        "use_ddim was at its default, is true; ddim_eta was at its default, is 0.5",
    ),
    "checkpoint": (_write("weights.pt", b"others"), "the file of model_path changed"),
    "precision": (
        lambda case: setattr(case, "speed", Speed("bf16")),
        "precision was fp32, is bf16",
    ),
    "compile": (
        lambda case: setattr(case, "speed", Speed(compile=True)),
        "compile was false, is true",
    ),
    "cuda_graph": (
        lambda case: setattr(case, "speed", Speed(cuda_graph=True)),
        "cuda_graph was false, is true",
    ),
    "device": (
        lambda case: setattr(case, "device", torch.device("cuda:1")),
        "device was cpu, is cuda",
    ),
}


@pytest.mark.filterwarnings("ignore:3 of 5 masks")  # of those with convention: fill
@pytest.mark.parametrize("change", ALL)
def test_a_setting_that_changes_pixels_does_all_again(case, change):
    case.finish()
    spoil, reason = ALL[change]
    spoil(case)
    plan = case.plan()
    assert plan.done == frozenset() and plan.redo == dict.fromkeys(NAMES, reason)
    case.finish()
    assert case.plan().done == set(NAMES)


def test_another_version_of_the_program_does_all_again(case):
    case.finish()
    with patch.object(recipes, "PIXELS", recipes.PIXELS + 1):
        plan = case.plan()
    assert set(plan.redo.values()) == {"version of the program was 1, is 2"}


@pytest.mark.filterwarnings("ignore:5 of 5 masks")  # enlarged, they have edges
def test_another_classifier_does_all_again(case):
    case.keys |= {
        "image_size": 64,
        "attention_resolutions": "32",
        "classifier_scale": 1.0,
        "classifier_path": str(case.path / "classifier.pt"),
    }
    case.finish()
    assert case.plan().done == set(NAMES)
    (case.path / "classifier.pt").write_bytes(b"another")
    assert set(case.plan().redo.values()) == {"the file of classifier_path changed"}


NOTHING: dict[str, Callable[[Case], object]] = {
    "name": _set(name="another"),
    "progress": _set(show_progress=False),
    "saving": _set(checkpoint_every=1),
    "showing": _set(log_every=5),
    "the device, named": _set(device="cpu"),
    "the precision, named": _set(precision="fp32"),
    "why so fast": lambda case: setattr(case, "speed", Speed(reason="fast: it is")),
    "batch_size": _set_dataset(batch_size=3),
    "order": _set_dataset(deterministic=False),
    "fewer images": _set_dataset(max_len=4),
    "where files are": _move_inputs,
    "an older file": lambda case: os.utime(case.path / "gts" / "a.png", (1, 1)),
}


@pytest.mark.parametrize("change", NOTHING)
def test_a_setting_that_changes_no_pixel_does_nothing_again(case, change):
    case.finish()
    NOTHING[change](case)
    plan = case.plan()
    assert plan.redo == {} and plan.is_done(plan.tasks) and plan.batches == []


def test_a_key_at_its_default_is_as_good_as_none(case):
    """Else a version of the program that knows one more key would make everything again."""
    without = case.recipe.digest
    case.keys |= {"clip_denoised": True, "cond_y": None, "noise_schedule": "linear"}
    case.keys |= {"use_ddim": False, "ddim_eta": 0}
    assert case.recipe.digest == without
    case.keys["clip_denoised"] = False
    assert case.recipe.digest != without


def test_a_checkpoint_that_is_gone_is_a_user_error(case):
    case.finish()
    (case.path / "weights.pt").unlink()
    with pytest.raises(UserError, match=r"weights\.pt: no such checkpoint; check the path"):
        case.plan()


def test_overwrite_does_all_again(case):
    case.finish(NAMES[:2])
    plan = case.plan(overwrite=True)
    assert plan.done == frozenset() and plan.run == 2
    assert plan.redo == dict.fromkeys(NAMES[:2], "--overwrite was given")
    assert names_in_batches(plan) == [[name] for name in NAMES]


def test_the_seed_of_the_run_before_is_taken_unless_there_is_one(case):
    case.keys["seed"] = None
    with patch.object(planning.secrets, "randbelow", side_effect=[11, 22, 33]) as drawn:
        assert case.finish().config.seed == 11
        assert case.plan().config.seed == 11 and case.plan().done == set(NAMES)
        assert case.plan(overwrite=True).config.seed == 22
        case.keys["seed"] = 5
        assert case.finish().config.seed == 5
        case.keys["seed"] = None
        assert case.plan().config.seed == 5  # the latest
        assert drawn.call_count == 2


def test_a_plan_holds_the_lock_that_a_dry_run_does_not_need(case):
    case.finish()
    records = case.records
    make_plan(case.config(), TIMES, case.recipe, records)
    with pytest.raises(UserError, match="another run is writing these results"):
        case.plan()
    assert case.plan(dry_run=True).done == set(NAMES)
    del records
    case.plan()


# ---- What the file system can hold ----


def lengthen(case: Case, name: str) -> None:
    """Give the third image, and its mask, another name, without its suffix."""
    for kind in ("gts", "masks"):
        (case.path / kind / "sub" / "c.png").rename(case.path / kind / "sub" / f"{name}.png")


LONG = {  # changes -> the longest stem that a name of 255 bytes leaves for them
    "plain": ({}, {}, 251),
    "samples": ({"samples_per_image": 2}, {}, 249),  # _0.png
    "eleven samples": ({"samples_per_image": 11}, {}, 248),  # _10.png
    "film": ({"log_every": 2}, {}, 250),  # .webp
    "film of samples": ({"log_every": 2, "samples_per_image": 2}, {}, 248),
    "film of a region": ({"log_every": 2}, {"fit": "region"}, 250),
}


@pytest.mark.filterwarnings("ignore:1 of 5 photos have holes")
@pytest.mark.parametrize("letter", ["x", "é"])
@pytest.mark.parametrize("change", LONG)
def test_a_name_that_does_not_fit_is_refused_before_anything_is_made(case, change, letter):
    keys, dataset, longest = LONG[change]
    case.keys |= keys
    case.dataset |= dataset
    size = len(letter.encode())
    name = "y" * (longest % size) + letter * (longest // size)
    lengthen(case, name)
    assert any(name in task.name for task in case.plan(dry_run=True).tasks)
    case.path.joinpath("gts/sub", f"{name}.png").rename(case.path / "gts/sub/c.png")
    case.path.joinpath("masks/sub", f"{name}.png").rename(case.path / "masks/sub/c.png")
    if longest == 251:
        return  # a longer one cannot be given
    lengthen(case, f"y{name}")
    with pytest.raises(UserError, match="one that is made of it would have 256 bytes") as error:
        case.plan(dry_run=True)
    assert f"the name of {case.path}/gts/sub/y{name}.png is too long" in str(error.value)


def test_films_of_several_regions_and_names_that_are_encoded_count(case):
    case.keys["log_every"] = 2
    for name, size in (("[" * 84, 257), ("x" * 247, 0)):
        lengthen(case, name)
        if size:  # each bracket takes three letters
            with pytest.raises(UserError, match=f"would have {size} bytes"):
                case.plan(dry_run=True)
        case.path.joinpath("gts/sub", f"{name}.png").rename(case.path / "gts/sub/c.png")
        case.path.joinpath("masks/sub", f"{name}.png").rename(case.path / "masks/sub/c.png")
    lengthen(case, "x" * 247)
    case.dataset["fit"] = "region"
    case.keys["image_size"] = 4
    case.keys["attention_resolutions"] = "2"
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[0, 0] = mask[-1, -1] = 0
    Image.fromarray(mask).save(case.path / "masks" / "sub" / ("x" * 247 + ".png"))
    with pytest.raises(UserError, match="would have 260 bytes"):  # _region2.webp
        case.plan(dry_run=True)


# ---- In words ----


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"jump_n_sample": 1}, "makes no jump: jump_n_sample is 1"),
        ({"jump_length": 10}, "makes no jump: t_T is 10 and jump_length 10"),
        ({"jump_length": 9}, ""),
        ({"jump_n_sample": 1, "n_sample": 2}, ""),
        ({"jump_n_sample": 1, "jump2_n_sample": 2}, ""),
    ],
)
def test_a_schedule_without_a_jump_is_told(case, change, line):
    schedule = {"t_T": 10, "n_sample": 1, "jump_length": 2, "jump_n_sample": 2}
    case.keys["schedule_jump_params"] = schedule | change
    lines = case.plan().describe(CPU, Speed()).splitlines()
    assert len(lines) == 4 + bool(line)
    if line:
        assert lines[2] == f"nothing is resampled, as the schedule {line}"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"classifier_scale": 2.5},
            "no guidance: classifier_scale is 2.5, but there is no classifier_path",
        ),
        (
            {"classifier_path": "c.pt"},
            "no guidance: there is a classifier_path, but classifier_scale is 0",
        ),
    ],
)
def test_half_of_guidance_is_told(case, keys, line):
    case.keys |= keys
    assert line in case.plan().describe(CPU, Speed()).splitlines()


@pytest.mark.parametrize(
    ("dataset", "share"),
    [({}, "5 images"), ({"max_len": 2}, "2 of 5 images"), ({"offset": 4}, "1 of 5 images")],
)
def test_images_that_are_left_out_are_counted(case, dataset, share):
    case.dataset |= dataset
    first = case.plan().describe(CPU, Speed()).splitlines()[0]
    assert f": {share} from {case.path}/gts, masks from {case.path}/masks (by name), " in first


def test_what_is_done_and_what_is_done_again_is_told(case):
    case.finish(NAMES[:4])
    shutil.copy(case.path / "gts" / "a.png", case.path / "gts" / "sub" / "c.png")
    shutil.copy(case.path / "masks" / "a.png", case.path / "masks" / "b.png")
    *_, done, redo = case.plan().describe(CPU, Speed()).splitlines()
    assert done == "2 of 5 are finished and skipped (--overwrite does them again)"
    assert redo == (
        "2 of 5 were made before and are done again, first b.png: the mask changed "
        f"(and 1 other reason); earlier results go to {case.results}.old"
    )


def test_a_fresh_plan_tells_nothing_of_earlier_runs(case):
    lines = case.plan().describe(CPU, Speed()).splitlines()
    assert len(lines) == 4 and lines[-1] == "device cpu, fp32"
    assert not case.plan().describe_results().startswith("all were finished")
    case.finish()
    assert case.plan().describe_results() == (
        "all were finished before (--overwrite makes them again); "
        f"results: {case.results} (settings and times: {case.path}/out/run.json)\n"
        f"to look at: {case.path}/out/report.html"
    )


# ---- For other processes ----


@pytest.mark.parametrize("seed", [SEED, None])
def test_a_plan_is_the_same_at_the_other_process(case, seed):
    case.keys |= {"samples_per_image": 2, "seed": seed}
    case.dataset |= {"batch_size": 3, "random_flip": True, "deterministic": False}
    case.finish()
    (case.results / "b_0.png").unlink()
    (case.results / "a_1.png").write_bytes(b"pict")
    plan = replace(case.plan(), digest="a1b2")
    assert plan.done and plan.redo
    content = json.loads(json.dumps(to_json(plan)))
    other = from_json(case.config(), content)
    assert other == plan
    assert other.config.seed == plan.config.seed and other.batches == plan.batches
    assert asdict(other) == asdict(plan)  # also what does not count as a difference


def in_two_processes(case: Case, overwrite: bool = False) -> list[Plan | UserError]:
    """The plans that `make_job` gives, or what it raises, in the processes of ranks 0 and 1."""
    store, found = HashStore(), [None, None]
    config, recipe = case.config(), case.recipe

    def share(rank: int) -> None:
        team = Team(World(rank, 2, rank, 2), store)
        try:
            found[rank] = make_job(config, TIMES, recipe, team, overwrite=overwrite).plan
        except UserError as error:
            found[rank] = error

    other = threading.Thread(target=share, args=[1])
    other.start()
    share(0)
    other.join(timeout=20)
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_rank_0_plans_for_all(case, overwrite):
    case.keys["seed"] = None
    case.finish(NAMES[:2])
    with patch.object(planning, "make_plan", wraps=make_plan) as made:
        first, second = in_two_processes(case, overwrite)
    assert made.call_count == 1
    assert first == second and isinstance(first, Plan)
    assert first.done == (frozenset() if overwrite else set(NAMES[:2]))


def test_what_rank_0_finds_wrong_ends_all(case):
    (case.path / "gts" / "b.png").write_bytes(b"")
    first, second = in_two_processes(case)
    assert isinstance(first, UserError) and "gts/b.png" in str(first)
    assert isinstance(second, UserError) and str(second) == f"rank 0 has stopped: {first}"
