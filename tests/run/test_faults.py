"""One process: whatever stops a run, the same command again ends with the same files."""

import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from guided_diffusion import factory
from guided_diffusion.config import load_config
from guided_diffusion.machine import storage
from guided_diffusion.run.plan import make_plan
from guided_diffusion.run.recipe import Recipe
from guided_diffusion.run.records import Records
from guided_diffusion.run.records import Result as Finished
from tests.kill_runs import kill_repeatedly
from tests.support.case import GOLDEN, OUTPUTS, ROOT, Case
from tests.support.small_runs import (
    assert_equal,
    assert_part_of,
    assert_refused,
    evaluations,
    evaluations_saved,
    one_thread,
    outputs,
    recorded,
    small_case,
    start,
    states,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")

STOPPED = "stopped; to go on, run the same command again\n"


@pytest.fixture(autouse=True, scope="module")
def as_in_processes() -> Iterator[None]:
    with one_thread():
        yield


def interrupt(case: Case, at: int) -> None:
    """Run in this process until SIGTERM comes during an evaluation."""
    with evaluations(at, lambda: os.kill(os.getpid(), signal.SIGTERM)) as sizes:
        assert case.run().status == 128 + signal.SIGTERM
    assert len(sizes) == at


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Case:
    """Four images in a run that nothing disturbed, five evaluations each."""
    case = small_case(tmp_path_factory.mktemp("finished"))
    case.finish()
    return case


@pytest.fixture(scope="module")
def whole(finished) -> dict[str, bytes]:
    return outputs(finished)


@pytest.fixture
def case(finished, tmp_path) -> Case:
    """The finished run, in a folder of its own."""
    shutil.copytree(finished.out, tmp_path / "out")
    return small_case(tmp_path)


# ---- Stopped by a signal ----------------------------------------------------------------------

SLOW_STEPS = 3
SLOW_CALLS = 2 * (2 * SLOW_STEPS - 1)  # evaluations of a batch, of two batches


def slow_case(folder: Path, **keys: object) -> Case:
    """Three images, two samples of each, three at a time, which takes about 0.15 s."""
    batches = {"batch_size": 3, "samples_per_image": 2, "show_progress": True}
    return small_case(folder, 3, side=64, steps=SLOW_STEPS, **batches, **keys)


@pytest.fixture(scope="module")
def slow_whole(tmp_path_factory) -> dict[str, bytes]:
    case = slow_case(tmp_path_factory.mktemp("slow"))
    case.finish()
    return outputs(case)


def calls_done(case: Case) -> int:
    """Evaluations of batches that need not be done again."""
    return len(recorded(case)) // 3 * (SLOW_CALLS // 2) + evaluations_saved(case)


def assert_goes_on(case: Case, whole: dict[str, bytes]) -> None:
    """The next run does what is missing, and no evaluation more."""
    assert_part_of(whole, case)
    done = calls_done(case)
    with evaluations() as sizes:
        case.finish()
    assert sizes == [3] * (SLOW_CALLS - done)
    assert_equal(whole, case)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    losses = kill_repeatedly(tmp_path, kills=3, seed=3)
    assert (losses.kills, losses.again) == (3, 0)


@pytest.mark.slow
def test_sigterm_is_obeyed_within_one_evaluation(slow_whole, tmp_path):
    case = slow_case(tmp_path, checkpoint_every=0)
    saving = tmp_path / "out" / "inpainted.run" / "unfinished"
    with start(case) as run:
        run.freeze_when(
            lambda: states(case) and evaluations_saved(case) >= 2 and not list(saving.glob(".*"))
        )
        before = calls_done(case)
        run.send(signal.SIGTERM)
        run.thaw()
        result = run.end()
    assert result.status == 128 + signal.SIGTERM
    assert result.err.endswith(STOPPED)
    assert calls_done(case) == before + 1  # the one that was running
    assert_goes_on(case, slow_whole)


@pytest.mark.slow
def test_ctrl_c_saves_the_state_where_none_was_saved_before(slow_whole, tmp_path):
    case = slow_case(tmp_path)
    with start(case) as run:
        run.wait_until(lambda: run.shown >= 2 * 3)
        assert not states(case)
        run.send(signal.SIGINT)
        result = run.end()
    assert result.status == 128 + signal.SIGINT
    assert result.err.endswith(STOPPED)
    assert evaluations_saved(case) >= 2
    assert_goes_on(case, slow_whole)


@pytest.mark.slow
def test_killed_in_a_picture_it_loses_at_most_one_evaluation(slow_whole, tmp_path):
    case = slow_case(tmp_path, checkpoint_every=0)
    losses = []  # evaluations, if it were killed at that moment

    def most_of_a_batch_is_saved() -> bool:
        if not states(case):
            return False
        losses.append(run.shown // 3 - calls_done(case))
        return evaluations_saved(case) >= SLOW_CALLS // 2 - 1

    with start(case) as run:
        run.freeze_when(most_of_a_batch_is_saved)
        run.send(signal.SIGKILL)
        assert run.end().status == -signal.SIGKILL
    assert max(losses) <= 1
    assert_goes_on(case, slow_whole)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    case = small_case(tmp_path, side=128, batch_size=4, show_progress=True)  # 1.8 s an evaluation

    def second_would_end_it() -> bool:
        status = Path(f"/proc/{run.popen.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*([0-9a-f]+)", status)[1], 16)
        return not caught >> (signal.SIGINT - 1) & 1

    with start(case) as run:
        run.wait_until(lambda: "image 1-4 of 4" in run.err)
        run.send(signal.SIGINT)
        run.wait_until(second_would_end_it)
        run.send(signal.SIGINT)
        assert run.end().status == -signal.SIGINT
    assert not states(case)


def test_a_damaged_state_is_not_used(whole, tmp_path):
    case = small_case(tmp_path)
    interrupt(case, at=7)
    (state,) = states(case)
    state.write_bytes(state.read_bytes()[:-100])
    with evaluations() as sizes:
        result = case.run()
    assert result.status == 0
    assert any("the images of this state start afresh" in line for line in result.lines("warning"))
    assert len(sizes) == 3 * 5
    assert_equal(whole, case)


def test_the_state_of_an_image_that_was_replaced_is_not_used(tmp_path):
    case = small_case(tmp_path)
    interrupt(case, at=7)
    shutil.copy(tmp_path / "gts" / "000003.png", tmp_path / "gts" / "000001.png")
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == 3 * 5
    assert_equal(fresh(case), case)


def fresh(case: Case) -> dict[str, bytes]:
    """What the same config writes into an empty folder."""
    case.write_to("fresh")
    case.finish()
    files = outputs(case)
    case.write_to("out")
    return files


# ---- The disk ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_room_for_a_picture(tmp_path):
    case = small_case(tmp_path, images=2, side=64)  # of 10 kB; all other files are smaller
    with start(case, file_size=6_000) as run:
        line = assert_refused(run.end())
    assert f"cannot write {case.out}/inpainted/000000.png: File too large" in line
    assert not outputs(case).keys() & {"inpainted/000000.png"}
    assert not list(case.out.rglob(".*"))
    case.finish()
    assert_equal(fresh(case), case)


@pytest.mark.slow
def test_no_room_for_states_and_records(tmp_path):
    case = small_case(tmp_path, images=12, checkpoint_every=0)
    with start(case, file_size=3_300) as run:  # records: 0.6 kB, and 0.3 kB a picture
        result = run.end()
    assert f"cannot write {case.out}/inpainted.run/images-0.jsonl: " in assert_refused(result)
    warning = r"warning: cannot save the state in .*/unfinished/\w+\.state: .*"
    assert result.lines("warning") and not states(case)
    assert all(re.fullmatch(warning, line) for line in result.lines("warning"))
    left = 12 - len(recorded(case))
    assert 0 < left < 12
    assert not list(case.out.rglob(".*"))
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == left * 5
    assert_equal(fresh(case), case)


@pytest.mark.parametrize("missing", ("1", "half", "end", "line feed", "line"))
def test_half_a_line_of_records(missing, case, whole):
    path = case.out / "inpainted.run" / "images-0.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    kept = {"1": 1, "half": len(last) // 2, "end": -2, "line feed": -1, "line": 0}[missing]
    path.write_bytes(b"".join(lines) + last[:kept])
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == (0 if missing == "line feed" else 5)
    assert_equal(whole, case)
    with evaluations() as sizes:
        assert "all were finished before" in case.run().out
    assert not sizes


def test_without_records_everything_is_made_again(case, whole):
    (case.out / "inpainted.run" / "images-0.jsonl").write_bytes(b"\0" * 4096)
    result = case.run()
    assert "4 of 4 were made before and are done again, first 000000.png: it is not known how" in (
        result.out
    )
    assert_equal(whole, case)


def test_a_result_that_was_cut_short_by_hand(case, whole):
    path = case.out / "inpainted" / "000002.png"
    path.write_bytes(path.read_bytes()[:-1])
    with evaluations() as sizes:
        result = case.run()
    assert "first 000002.png: its file was changed by something else" in result.out
    assert len(sizes) == 5
    assert_equal(whole, case)


def test_pictures_of_the_input_are_written_again_without_sampling(case, whole):
    shutil.rmtree(case.out / "gt")
    (case.out / "gt_masked" / "000001.png").unlink()
    with evaluations() as sizes:
        assert case.run().status == 0
    assert not sizes
    assert_equal(whole, case)


@pytest.mark.slow
@pytest.mark.parametrize("deleted", ("out", "out/inpainted"))
def test_a_folder_that_is_deleted_meanwhile(deleted, whole, tmp_path):
    case = small_case(tmp_path, checkpoint_every=0)
    with start(case) as run:
        run.freeze_when(lambda: len(recorded(case)) >= 2)
        shutil.rmtree(tmp_path / deleted)
        run.thaw()
        line = assert_refused(run.end())
    assert "run the same command again" in line or "the same command goes on" in line
    assert_part_of(whole, case)
    there = set(outputs(case)) & {f"inpainted/{name}" for name in recorded(case)}
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == (4 - len(there)) * 5
    assert_equal(whole, case)


@contextmanager
def without_privileges() -> Iterator[None]:
    """To root, permissions do not matter."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        if not os.access(ROOT / "test.py", os.R_OK, effective_ids=True):
            pytest.skip("the code can be read by root only")
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_an_output_folder_that_cannot_be_written(whole):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        case = small_case(Path(folder) / "case")
        case.config["model_path"] = shutil.copy(GOLDEN / "tiny32.pt", folder)
        case.folder.chmod(0o777)
        case.out.mkdir(mode=0o555)
        with without_privileges():
            line = assert_refused(case.run())
        assert f"cannot write in the output folder {case.out}/" in line
        assert "Permission denied" in line
        case.out.chmod(0o755)
        case.finish()
        assert_equal(whole, case)


def test_an_output_folder_below_a_file(case):
    (case.folder / "file").touch()
    case.dataset["paths"]["srs"] = f"{case.folder}/file/inpainted"
    assert f"cannot write in the output folder {case.folder}/file/" in assert_refused(case.run())


# ---- Two runs at once -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_refuses_while_the_first_one_works(slow_whole, tmp_path):
    case = slow_case(tmp_path)
    with start(case) as run:
        run.wait_until(lambda: run.shown)
        run.freeze()
        line = assert_refused(case.run())
        assert case.run("--dry-run").status == 0
        run.thaw()
        assert run.end().status == 0
    assert f"another run is writing these results (process {run.popen.pid} on " in line
    assert_equal(slow_whole, case)


@pytest.mark.slow
def test_two_runs_that_are_started_together(whole, tmp_path):
    case = small_case(tmp_path)
    with start(case) as first, start(case) as second:
        results = [first.end(), second.end()]
    done, refused = sorted(results, key=lambda result: result.status)
    assert done.status == 0
    if refused.status != 0:  # otherwise it was so late that all was done
        assert "another run is writing these results" in assert_refused(refused)
    assert_equal(whole, case)


# ---- Something changed between two runs -------------------------------------------------------


def replace_image(case: Case) -> None:
    shutil.copy(case.folder / "gts" / "000003.png", case.folder / "gts" / "000001.png")


def replace_mask(case: Case) -> None:
    shutil.copy(case.folder / "masks" / "000003.png", case.folder / "masks" / "000001.png")


def change_setting(case: Case) -> None:
    case.config["paste_known"] = True


def change_seed(case: Case) -> None:
    case.config["seed"] = 20


def change_checkpoint(case: Case) -> None:
    weights = torch.load(GOLDEN / "tiny32.pt", weights_only=True)
    torch.save({key: weight * 1.01 for key, weight in weights.items()}, case.folder / "other.pt")
    case.config["model_path"] = str(case.folder / "other.pt")


ALL = [f"{number:06}.png" for number in range(4)]


@pytest.mark.parametrize(
    ("change", "again", "reason"),
    [
        (replace_image, ["000001.png"], "the image changed"),
        (replace_mask, ["000001.png"], "the mask changed"),
        (change_setting, ALL, "paste_known was at its default, is true"),
        (change_seed, ALL, "the seed changed, or its place among the images"),
        (change_checkpoint, ALL, "the file of model_path changed"),
    ],
)
def test_what_a_change_concerns_is_made_again(change, again, reason, case, whole):
    change(case)
    with evaluations() as sizes:
        result = case.run()
    assert result.status == 0
    assert len(sizes) == len(again) * 5
    assert (
        f"{len(again)} of 4 were made before and are done again, first {again[0]}: {reason}; "
        f"earlier results go to {case.out}/inpainted.old\n"
    ) in result.out
    old = {path.name: path.read_bytes() for path in (case.out / "inpainted.old").iterdir()}
    assert old == {name: whole[f"inpainted/{name}"] for name in again}
    assert_equal(fresh(case), case)


def test_overwrite_makes_all_again(case, whole):
    with evaluations() as sizes:
        case.finish("--overwrite")
    assert len(sizes) == 4 * 5
    assert_equal(whole, case)
    assert len(list((case.out / "inpainted.old").iterdir())) == 4


def test_a_seed_that_was_drawn_is_kept_by_the_next_run(tmp_path):
    case = small_case(tmp_path, seed=None)
    interrupt(case, at=7)
    seed = case.record()["seed"]
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == 4 * 5 - 7
    assert case.record()["seed"] == seed
    case.config["seed"] = seed
    assert_equal(fresh(case), case)


# ---- Several samples --------------------------------------------------------------------------


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    """At most one grey level apart, in at most 0.1 % of the values."""
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_each_sample_has_a_stream_of_its_own(finished, tmp_path):
    case = small_case(tmp_path, samples_per_image=2, batch_size=3)
    samples = case.finish()
    assert set(samples) == {name.replace(".png", f"_{k}.png") for name in ALL for k in (0, 1)}
    assert set(case.written("gt")) == set(ALL)
    other = small_case(tmp_path / "other", seed=10 + 2**32)
    for k, single in enumerate((finished.written(), other.finish())):
        for name, picture in single.items():
            assert_near(samples[name.replace(".png", f"_{k}.png")], picture)


# ---- Many images ------------------------------------------------------------------------------

MANY = 10_000


def pretend_to_be_finished(case: Case) -> None:
    """Write what a finished run would have left, with the same picture for all results."""
    config = load_config(case.conf_path())
    speed = factory.choose_speed(config, torch.device("cpu"))
    recipe = Recipe(config, torch.device("cpu"), speed)
    records = Records(config.dataset.inpainted_dir)
    plan = make_plan(config, factory.build_times(config), recipe, records)
    picture = case.folder / "gts" / "000000.png"
    for kind in OUTPUTS.values():
        (case.out / kind).mkdir(parents=True)
        for task in plan.tasks:
            os.link(picture, case.out / kind / task.name)
    Path(plan.report_path).touch()
    lines: list[str] = []
    with patch.object(storage, "append_line", lambda path, line: lines.append(line)):
        records.begin(plan.run, config.seed, recipe.settings)
        for task in plan.tasks:
            size = picture.stat().st_size
            records.finished(task.name, Finished(plan.run, recipe.digest, task.origin, size, 0.1))
    storage.write_atomically(records.path, "".join(f"{line}\n" for line in lines).encode())


@pytest.mark.slow
def test_ten_thousand_finished_images_are_looked_through_within_five_seconds(tmp_path):
    case = small_case(tmp_path, max_len=None)
    for number in range(4, MANY):
        os.link(tmp_path / "gts" / f"{number % 4:06}.png", tmp_path / "gts" / f"{number:06}.png")
    case.dataset["mask_path"] = str(tmp_path / "masks" / "000000.png")
    pretend_to_be_finished(case)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with start(case) as run:
        result = run.end()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.status == 0, result.err
    assert "all were finished before" in result.out
    assert case.record()["images"] == MANY
    # Not the time on the clock, which on busy cores says more about the other processes.
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 5
