"""The list of times, against golden lists and its contract; the command that draws it."""

import doctest
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

from guided_diffusion import scheduler
from guided_diffusion.config import ScheduleConfig
from guided_diffusion.output.schedule_plot import schedule_figure
from guided_diffusion.scheduler import (
    PAPER_SCHEDULE,
    count_evaluations,
    ddim_times,
    jump_times,
    plain_times,
    schedules_of,
)
from tests.support.schedules import schedules

ROOT = Path(__file__).parents[1]
SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())


def ups(times: list[int]) -> list[int]:
    """The times at which a transition goes back in time."""
    return [t for t, u in pairwise(times) if u > t]


def test_the_examples_of_the_docs_are_true():
    result = doctest.testmod(scheduler)
    assert result.attempted == 5 and result.failed == 0


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


@pytest.mark.parametrize(
    ("ddim_steps", "kept", "evaluations"),
    [
        (1, [0, 1], 1),
        (2, [0, 1, 501], 2),
        (3, [0, 1, 334, 667], 3),  # the next, 1000, is no step
        (6, [0, 1, 167, 333, 499, 665, 831, 997], 7),
        (7, [0, 1, 143, 285, 427, 569, 711, 853, 995], 8),
        (10, [0, 1, 101, 201, 301, 401, 501, 601, 701, 801, 901], 10),
        (400, [0, *range(1, 1000, 2)], 500),
        (500, [0, *range(1, 1000, 2)], 500),
        (501, list(range(1000)), 999),
        (1000, list(range(1000)), 999),
    ],
)
def test_ddims_steps_worked_by_hand(ddim_steps, kept, evaluations):
    found, times = ddim_times(ddim_steps)
    assert found == kept
    assert (times[0], times[-1]) == (evaluations, 0)
    assert count_evaluations(times) == evaluations


def test_ddims_50_steps_end_at_step_0_of_the_base_process():
    kept, times = ddim_times(50)
    assert kept[:4] == [0, 1, 21, 41] and kept[-2:] == [961, 981] and len(kept) == 51
    assert times == list(range(50, -1, -1))


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_ddims_steps_stay_within_the_base_process_and_walk_down_all_of_them(ddim_steps):
    kept, times = ddim_times(ddim_steps)
    assert kept == sorted(set(kept)) and kept[:2] == [0, 1] and kept[-1] <= 999
    assert len({u - t for t, u in pairwise(kept[1:])}) <= 1  # evenly spread
    assert [kept[time] for time in times] == kept[::-1]
    assert ups(times) == []


# ---- The command -----------------------------------------------------------------------------


JUMPS = "schedule_jump_params: {t_T: 20, n_sample: 1, jump_length: 5, jump_n_sample: 3}"


def write_config(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["model_path: none.pt", *lines]))
    return str(path)


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


@pytest.mark.slow
def test_by_default_the_papers_setting_is_drawn_to_schedule_png(tmp_path):
    pytest.importorskip("matplotlib")
    run = draw(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2,410 evaluations, 2,160 re-noising steps" in run.stdout
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors()) > 1


@pytest.mark.slow
def test_a_configs_schedule_is_drawn_where_asked(tmp_path):
    pytest.importorskip("matplotlib")
    write_config(tmp_path / "conf.yml", JUMPS)
    run = draw(tmp_path, "--conf_path", "conf.yml", "--out", "mine.png")
    assert run.returncode == 0, run.stderr
    assert "50 evaluations, 30 re-noising steps" in run.stdout  # jumps of 5 from 10, 5 and 0, twice
    assert "mine.png" in run.stdout
    assert (tmp_path / "mine.png").stat().st_size > 0
    assert not (tmp_path / "schedule.png").exists()


@pytest.mark.slow
def test_a_missing_config_is_refused(tmp_path):
    assert_refused(draw(tmp_path, "--conf_path", "missing.yml"), "missing.yml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "evaluations"),
    [
        ("diffusion_steps: 60", 60),
        ("timestep_respacing: '30'", 30),
        ("timestep_respacing: ddim25", 25),
        ("timestep_respacing: '10,15,5'", 30),
        ("", 1000),  # the sampler's own default
    ],
)
def test_a_config_without_a_schedule_is_sampled_plainly(tmp_path, steps, evaluations):
    path = write_config(tmp_path / "conf.yml", steps)
    assert schedules_of([path]) == {path: plain_times(evaluations)}


@pytest.mark.parametrize(("steps", "evaluations"), [("", 50), ("ddim_steps: 7", 8)])
def test_a_latent_config_walks_ddims_steps(tmp_path, steps, evaluations):
    path = write_config(tmp_path / "conf.yml", "method: latent", steps)
    assert schedules_of([path]) == {path: list(range(evaluations, -1, -1))}


@pytest.mark.slow
def test_the_schedule_of_latent_diffusion_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run = draw(tmp_path, "--conf_path", str(ROOT / "confs" / "ldm_inpainting.yml"))
    assert run.returncode == 0, run.stderr
    assert "50 evaluations, 0 re-noising steps" in run.stdout
    assert (tmp_path / "schedule.png").stat().st_size > 0


@pytest.mark.slow
def test_several_configs_are_compared_with_their_costs(tmp_path):
    pytest.importorskip("matplotlib")
    write_config(tmp_path / "jumps.yml", JUMPS)
    write_config(tmp_path / "b.yml", "timestep_respacing: '20'", "name: plain sampling")
    run = draw(tmp_path, "--conf_path", "jumps.yml", "b.yml", "--out", "compared.png")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "jumps: 50 evaluations, 30 re-noising steps an image",
        "plain sampling: 20 evaluations, 0 re-noising steps an image",
        "written: compared.png",
    ]
    with Image.open(tmp_path / "compared.png") as picture:
        colours = dict(map(reversed, picture.convert("RGB").getcolors(10**6)))
    # matplotlib's first two, blue and orange
    assert colours[(31, 119, 180)] > 50 and colours[(255, 127, 14)] > 50


def test_configs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    a, b = (write_config(tmp_path / name, "name: mine", JUMPS) for name in ("a.yml", "b.yml"))
    c = write_config(tmp_path / "c.yml", "name: yours", JUMPS)
    assert list(schedules_of([a, b, c])) == [f"mine ({a})", f"mine ({b})", "yours"]


@pytest.mark.slow
def test_of_several_configs_one_that_is_wrong_is_named_and_nothing_written(tmp_path):
    write_config(tmp_path / "good.yml", JUMPS)
    write_config(tmp_path / "bad.yml", "timestep_respacing: '2000'")
    run = draw(tmp_path, "--conf_path", "good.yml", "bad.yml")
    assert_refused(run, "bad.yml", "timestep_respacing")
    assert run.stdout == "" and not (tmp_path / "schedule.png").exists()


@pytest.mark.parametrize("number", [2, 12, 40])
def test_curves_differ_in_looks_and_the_legend_hides_none(number):
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    schedules = {
        f"schedule {i} of {'a long name ' * 5}": plain_times(10 + i) for i in range(number)
    }
    figure = schedule_figure(schedules, "title")
    backend.FigureCanvasAgg(figure).draw()
    ((axes,), (legend,)) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(schedules)
    for lines in (axes.lines, legend.get_lines()):
        looks = [(line.get_color(), line.get_linestyle()) for line in lines]
        assert len(set(looks)) == number
    assert [line.get_color() for line in legend.get_lines()] == [
        line.get_color() for line in axes.lines
    ]
    outside = legend.get_window_extent()
    assert outside.y1 < axes.get_tightbbox().y0  # below everything of the axes
    assert outside.x0 >= 0 and outside.y0 >= 0 and outside.x1 <= figure.bbox.x1
    assert axes.get_window_extent().height > 200
    assert axes.get_xlim() == (0, 10 + number - 1)


def test_a_single_schedule_has_no_legend():
    pytest.importorskip("matplotlib")
    figure = schedule_figure({"mine": [2, 1, 0, -1]}, "mine: 3 evaluations")
    (axes,) = figure.axes
    assert figure.legends == [] and axes.get_legend() is None
    assert axes.get_title() == "mine: 3 evaluations"
    assert axes.lines[0].get_ydata().tolist() == [2, 1, 0, -1]
    assert axes.get_xlim() == (0, 3)


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    assert_refused(draw(tmp_path, "--out", "missing/schedule.png"), "missing/schedule.png")


@pytest.mark.slow
def test_without_matplotlib_the_user_is_told_how_to_get_it(tmp_path):
    fake = tmp_path / "site"
    fake.mkdir()
    (fake / "matplotlib.py").write_text("raise ImportError('no matplotlib here')\n")
    run = draw(tmp_path, PYTHONPATH=str(fake))
    assert_refused(run, "pip install matplotlib")
    assert not (tmp_path / "schedule.png").exists()
