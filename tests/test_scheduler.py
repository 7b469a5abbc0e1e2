"""The list of times, against golden lists and its contract; the command that draws it."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.config import ScheduleConfig
from guided_diffusion.scheduler import (
    PAPER_SCHEDULE,
    count_evaluations,
    jump_times,
    plain_times,
)

ROOT = Path(__file__).parents[1]
SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())

counts, lengths = st.integers(1, 3), st.integers(1, 8)
schedules = st.builds(
    ScheduleConfig,
    t_T=st.integers(1, 24),
    n_sample=counts,
    jump_length=lengths,
    jump_n_sample=counts,
    jump2_length=lengths,
    jump2_n_sample=counts,
    jump3_length=lengths,
    jump3_n_sample=counts,
    start_resampling=st.integers(0, 30),
)


def ups(times: list[int]) -> list[int]:
    """The times at which a transition goes back in time."""
    return [t for t, u in pairwise(times) if u > t]


# ---- The list --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda c: "-".join(map(str, c["params"].values())))
def test_times_equal_the_golden_ones(case):
    assert jump_times(ScheduleConfig(**case["params"])) == case["times"]


def test_the_papers_setting_costs_2410_evaluations_and_2160_re_noisings():
    times = jump_times(PAPER_SCHEDULE)
    assert (count_evaluations(times), len(ups(times))) == (2410, 2160)


def test_plain_times_visit_every_time_once():
    assert plain_times(4) == [3, 2, 1, 0, -1]
    assert count_evaluations(plain_times(4)) == 4


@settings(max_examples=200, deadline=None)
@given(schedules)
def test_every_list_walks_in_single_steps_from_the_top_to_the_end(params):
    times = jump_times(params)
    assert times[0] == params.t_T - 1
    assert times[-2:] == [0, -1]
    assert max(times) == params.t_T - 1
    assert set(times) == set(range(-1, params.t_T))
    assert times.count(-1) == 1
    assert all(abs(t - u) == 1 for t, u in pairwise(times))
    assert count_evaluations(times) - len(ups(times)) == params.t_T
    assert all(t <= params.start_resampling for t in ups(times))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6))
def test_one_level_of_jumps_costs_its_length_at_each_multiple(t_T, length, count):
    times = jump_times(ScheduleConfig(t_T=t_T, n_sample=1, jump_length=length, jump_n_sample=count))
    starts = [t for t in range(t_T) if t % length == 0 and t < t_T - length]
    assert len(ups(times)) == len(starts) * (count - 1) * length


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 6))
def test_n_sample_repeats_each_step_but_the_first_two(t_T, n_sample):
    params = ScheduleConfig(t_T=t_T, n_sample=n_sample, jump_length=1, jump_n_sample=1)
    expected = [t for t in range(t_T - 2) for _ in range(n_sample - 1)]
    assert sorted(ups(jump_times(params))) == expected


# ---- The command -----------------------------------------------------------------------------


def draw(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "guided_diffusion" / "scheduler.py"), *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(run: subprocess.CompletedProcess, *words: str) -> None:
    """One line for the user, no traceback, status 2."""
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: ")
    for word in words:
        assert word in run.stderr


def test_by_default_the_papers_setting_is_drawn_to_schedule_png(tmp_path):
    pytest.importorskip("matplotlib")
    run = draw(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2,410 evaluations, 2,160 re-noising steps" in run.stdout
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors()) > 1


def test_a_configs_schedule_is_drawn_where_asked(tmp_path):
    pytest.importorskip("matplotlib")
    config = tmp_path / "conf.yml"
    jumps = "{t_T: 20, n_sample: 1, jump_length: 5, jump_n_sample: 3}"
    config.write_text(f"model_path: none.pt\nschedule_jump_params: {jumps}\n")
    run = draw(tmp_path, "--conf_path", "conf.yml", "--out", "mine.png")
    assert run.returncode == 0, run.stderr
    assert "50 evaluations, 30 re-noising steps" in run.stdout  # jumps of 5 from 10, 5 and 0, twice
    assert "mine.png" in run.stdout
    assert (tmp_path / "mine.png").stat().st_size > 0
    assert not (tmp_path / "schedule.png").exists()


def test_a_missing_config_is_refused(tmp_path):
    assert_refused(draw(tmp_path, "--conf_path", "missing.yml"), "missing.yml")
    assert list(tmp_path.iterdir()) == []


def test_a_config_without_a_schedule_is_refused(tmp_path):
    (tmp_path / "conf.yml").write_text("model_path: none.pt\n")
    assert_refused(draw(tmp_path, "--conf_path", "conf.yml"), "conf.yml", "schedule_jump_params")


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    assert_refused(draw(tmp_path, "--out", "missing/schedule.png"), "missing/schedule.png")


def test_without_matplotlib_the_user_is_told_how_to_get_it(tmp_path):
    fake = tmp_path / "site"
    fake.mkdir()
    (fake / "matplotlib.py").write_text("raise ImportError('no matplotlib here')\n")
    run = draw(tmp_path, PYTHONPATH=str(fake))
    assert_refused(run, "pip install matplotlib")
    assert not (tmp_path / "schedule.png").exists()
