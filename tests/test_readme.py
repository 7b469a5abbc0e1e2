"""The README's commands, files and numbers are those of the code."""

import re
from pathlib import Path

import pytest

from guided_diffusion.config import ScheduleConfig
from guided_diffusion.scheduler import count_evaluations, jump_times
from tests import exact_gaussian

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCHEDULES = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", README, re.MULTILINE)


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_two_blocks_are_one_line_each_that_sets_up_its_own_environment(index):
    language, text = BLOCKS[index]
    assert language == "bash"
    assert text.count("\n") == 1
    assert text.startswith("python3 -m venv .venv && .venv/bin/pip install -q -r requirements")


def test_the_first_block_runs_the_demo_and_the_second_the_tests():
    assert "test.py --conf_path confs/demo.yml" in BLOCKS[0][1]
    assert "ruff check" in BLOCKS[1][1]
    assert "pytest" in BLOCKS[1][1]


def test_files_that_the_readme_names_are_there():
    names = re.findall(r"\b(?:confs|data|guided_diffusion|tests)/[\w/]+\.(?:yml|py|png|pt)", README)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_costs_of_schedules_are_the_schedulers():
    assert len(SCHEDULES) >= 5
    for t_T, jump_length, jump_n_sample, evaluations in SCHEDULES:
        schedule = ScheduleConfig(
            t_T=int(t_T),
            n_sample=1,
            jump_length=int(jump_length),
            jump_n_sample=int(jump_n_sample),
        )
        expected = int(evaluations.replace(",", ""))
        assert count_evaluations(jump_times(schedule)) == expected


def test_the_table_of_the_exact_answer_is_what_its_command_prints(capsys):
    exact_gaussian.main()
    assert capsys.readouterr().out.strip() in README
