"""The commands, files, links and numbers of the README and of docs/ are those of the code."""

import re
from pathlib import Path

import pytest

from guided_diffusion.config import ScheduleConfig
from guided_diffusion.scheduler import count_evaluations, jump_times
from tests import exact_gaussian

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README, SAMPLERS = TEXTS["README.md"], TEXTS["docs/samplers.md"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCHEDULES = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", SAMPLERS, re.MULTILINE)
FILES = re.compile(
    r"(?<![\w/.])(?:confs|data|docs|guided_diffusion|tests)/[\w/]+\.(?:yml|py|png|webp|pt|md)"
)
DOWNLOADED = re.compile(r"data/pretrained/(?!portraits64)")
LINKS = re.compile(r"\]\(([^)\s]+)\)")

DEMO = ("requirements.txt && ", "test.py --conf_path confs/demo.yml")
TESTS = ("requirements-dev.txt && ", "ruff check", "pytest")


@pytest.mark.parametrize("parts", [DEMO, TESTS])
def test_one_block_is_one_line_that_sets_up_its_own_environment(parts):
    found = [(language, text) for language, text in BLOCKS if all(part in text for part in parts)]
    assert len(found) == 1
    language, text = found[0]
    assert language == "bash"
    assert text.count("\n") == 1
    assert text.startswith("python3 -m venv .venv && .venv/bin/pip install -q -r requirements")


def test_the_first_block_runs_the_demo_and_the_last_the_tests():
    assert all(part in BLOCKS[0][1] for part in DEMO)
    assert all(part in BLOCKS[-1][1] for part in TESTS)


def test_the_readme_is_short():
    assert README.count("\n") <= 170


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_names_are_there(page):
    names = [name for name in FILES.findall(TEXTS[page]) if not DOWNLOADED.match(name)]
    assert [name for name in names if not (ROOT / name).exists()] == []
    if page == "README.md":
        assert len(names) > 10


def test_modules_that_the_page_about_the_code_names_are_there():
    names = re.findall(r"`((?:\w+/)?\w+\.py)`", TEXTS["docs/code.md"])
    folders = (ROOT, ROOT / "guided_diffusion")
    assert len(names) > 20
    assert [name for name in names if not any((at / name).exists() for at in folders)] == []


def test_the_page_about_the_code_names_every_flat_module_and_every_room():
    package = ROOT / "guided_diffusion"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert len(modules) > 5 and len(rooms) > 5
    assert {name for name in modules | rooms if f"`{name}`" not in TEXTS["docs/code.md"]} == set()


@pytest.mark.parametrize("page", TEXTS)
def test_links_of_a_page_lead_somewhere(page):
    links = [link for link in LINKS.findall(TEXTS[page]) if not link.startswith("https://")]
    assert [link for link in links if not _leads_somewhere(ROOT / page, link)] == []


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.exists() and (not heading or heading in _anchors(target.read_text("utf-8")))


def _anchors(text: str) -> set[str]:
    """The names by which a page's headings are linked to on the common forges."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_has_every_page_of_docs():
    listed = set(LINKS.findall(TEXTS["docs/README.md"]))
    assert {page.name for page in DOCS} - {"README.md"} - listed == set()


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
    assert capsys.readouterr().out.strip() in SAMPLERS
