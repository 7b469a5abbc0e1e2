"""The house is in order: imports point down, functions are short.

A name is a file of `guided_diffusion/`, a room (a folder there), or scripts. A file imports from
lower floors alone, or from its own room; rooms on one floor never import each other.
"""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "guided_diffusion"
FLOORS = (
    ("networks", "gaussian_diffusion", "streams"),
    ("config",),
    ("machine", "downloads", "respace", "repaint", "scheduler"),
    ("images", "checkpoints", "denoiser", "langevin"),
    ("masks", "speed", "evaluation", "output", "inpainter"),
    ("run", "latent", "quick"),
    ("factory",),
    ("training", "benchmark", "__init__"),
    ("*.py",),
    ("data/*.py", "docs/make/*.py"),
)
# The command that draws the schedule lies in the scheduler, its plot in the room of pictures.
EXCEPTIONS = {("scheduler", "output.schedule_plot")}
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = [
    *sorted((ROOT / PACKAGE).rglob("*.py")),
    *SCRIPTS,
    *sorted([*ROOT.glob("data/*.py"), *ROOT.glob("docs/make/*.py")]),
]


def module_name(path: Path) -> str:
    """`repaint`, `training.loop`, `training.__init__`; of a script its path, `test.py`."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] != PACKAGE:
        return inside.as_posix()
    return ".".join(inside.with_suffix("").parts[1:])


def room(name: str) -> str:
    """The name under which the list above has a module or a script."""
    if not name.endswith(".py"):
        return name.split(".")[0]
    folder = name.rpartition("/")[0]
    return f"{folder}/*.py" if folder else "*.py"


MODULES = {module_name(path): path for path in SOURCES}


def imported_modules(source: str) -> Iterator[str]:
    """Modules of the package that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (_module_of(name) for name in dotted if name.split(".")[0] == PACKAGE)


def _module_of(dotted: str) -> str:
    """The module of the package that is, or holds, what goes by this dotted name."""
    name = dotted.removeprefix(PACKAGE).removeprefix(".")
    parent = name.rpartition(".")[0]
    candidates = (name, f"{name}.__init__", parent, f"{parent}.__init__")
    return next((known for known in candidates if known in MODULES), "__init__")


def forbidden_imports(name: str, source: str) -> list[str]:
    """Imports that do not point to a lower floor, nor stay within a folder's room."""
    return [
        target
        for target in imported_modules(source)
        if FLOOR_OF[room(target)] >= FLOOR_OF[room(name)]
        and not (room(name) == room(target) and "." in target)
        and (name, target) not in EXCEPTIONS
    ]


def test_no_circle_in_a_room():
    """Within a room, what a module imports does not lead back to it."""
    imports = {
        name: {to for to in imported_modules(path.read_text("utf-8")) if room(to) == room(name)}
        for name, path in MODULES.items()
    }
    for name in imports:
        reached, ahead = set(), set(imports[name])
        while ahead:
            reached |= ahead
            ahead = {to for each in ahead for to in imports[each]} - reached
        assert name not in reached


def function_lengths() -> dict[str, int]:
    """`module.function` -> number of lines, for every function of the program."""
    return {
        f"{name}.{node.name}, line {node.lineno}": node.end_lineno - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def test_every_module_has_a_floor_and_every_floor_its_modules():
    assert {room(name) for name in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_lower_floors(name):
    assert forbidden_imports(name, MODULES[name].read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "forbidden"),
    [
        ("networks.unet", "from guided_diffusion.networks.layers import attention", []),
        ("networks.unet", "import guided_diffusion.repaint", ["repaint"]),
        ("speed.choice", "def f():\n    from guided_diffusion.run import runner", ["run.runner"]),
        ("networks.unet", "from guided_diffusion.scheduler import jump_times", ["scheduler"]),
        ("streams", "from guided_diffusion.config import UserError", ["config.__init__"]),
        ("streams", "import guided_diffusion.config", ["config.__init__"]),
        ("config.file", "from guided_diffusion.config.errors import UserError", []),
        ("run.worker", "from guided_diffusion import load_inpainter", ["__init__"]),
        ("run.worker", "import guided_diffusion", ["__init__"]),
        ("masks.kinds", "from guided_diffusion.machine import storage", []),
        ("masks.kinds", "from guided_diffusion.output import film", ["output.film"]),
        ("data/x.py", "from guided_diffusion import load_inpainter", []),
        ("training.loop", "from guided_diffusion.training.ema import EMA", []),
        ("training.loop", "from guided_diffusion.run.plan import Plan", []),
        ("run.plan", "from guided_diffusion.training import loop", ["training.loop"]),
        ("scheduler", "from guided_diffusion.output import schedule_plot", []),
        ("respace", "from guided_diffusion.output import film", ["output.film"]),
        ("repaint", "import torch, math\nfrom guided_diffusion_2 import x", []),
    ],
)
def test_the_reader_of_imports_sees_them_all(name, source, forbidden):
    assert forbidden_imports(name, source) == forbidden


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_entry_scripts_are_thin(script):
    assert len(script.read_text("utf-8").splitlines()) < 80


def test_functions_fit_on_a_screen():
    lengths = function_lengths()
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}
    assert statistics.median(lengths.values()) < 15


@pytest.mark.slow
def test_reading_a_config_does_not_wait_for_torch():
    code = "import guided_diffusion.config, sys; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
    sources = [path.read_text("utf-8") for name, path in MODULES.items() if room(name) == "config"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    froms = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert len(froms) > 10 and not {"torch"} & {name.split(".")[0] for name in froms + plain}
