"""From the command to the sampler: few calls, few modules, each file read once; and from before."""

import inspect
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import pytest

from guided_diffusion.machine import storage
from guided_diffusion.networks.unet import UNet
from guided_diffusion.run import worker
from tests.support.case import EVALUATIONS, ROOT, Case
from tests.support.small_runs import evaluations

CALLS = 6
# The paper's flat files with the factory and the package's own are 9, config 8, images 10,
# checkpoints 6, run 6, machine 4, speed 4, networks 3. Six of them could wait: regions and tiles
# (whole photos, wide holes), lightning, safetensors, contents and mismatch (other files, errors).
MODULES = 50


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


# ---- The way to the sampler -------------------------------------------------------------------


def test_the_sampler_is_a_few_calls_from_the_command(case):
    ways = []

    def note(*_: object) -> None:
        ways.append(
            [
                frame.function
                for frame in inspect.stack(context=0)
                if frame.filename == str(ROOT / "test.py") or "guided_diffusion" in frame.filename
            ]
        )

    with evaluations(at=1, do=note):
        case.finish()
    (frames,) = ways
    way = frames[frames.index("repaint") : frames.index("main")]
    assert "run" in way and len(way) <= CALLS, way


@pytest.mark.slow
def test_a_run_of_a_pixel_model_imports_few_modules(case):
    """Counted when the network is called first; not the rooms' own files, which say one line."""
    code = f"""
import ast, runpy, sys
sys.argv = ["test.py", "--conf_path", {case.conf_path()!r}]
sys.path.insert(0, {str(ROOT)!r})
from guided_diffusion.networks.unet import UNet

def forward(*_):
    loaded = [m for name, m in sys.modules.items() if name.split(".")[0] == "guided_diffusion"]
    files = [m.__file__ for m in loaded]
    print(*[f for f in files if len(ast.parse(open(f, encoding="utf-8").read()).body) > 1])
    sys.exit(7)

UNet.forward = forward
runpy.run_path({str(ROOT / "test.py")!r}, run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 7, run.stderr
    modules = [Path(path).relative_to(ROOT) for path in run.stdout.splitlines()[-1].split()]
    assert Path("guided_diffusion/repaint.py") in modules
    assert len(modules) <= MODULES, sorted(map(str, modules))


# ---- Each file is read once -------------------------------------------------------------------


@contextmanager
def reads(case: Case) -> Iterator[Counter[str]]:
    """How often each input is opened meanwhile."""
    opened: Counter[str] = Counter()
    open_binary = storage.open_binary

    def counted(path: str) -> BinaryIO:
        if path.startswith((str(case.folder / "gts"), str(case.folder / "masks"))):
            opened[path] += 1
        return open_binary(path)

    with patch.object(storage, "open_binary", counted):
        yield opened


def inputs(case: Case) -> list[str]:
    return [str(path) for kind in ("gts", "masks") for path in (case.folder / kind).iterdir()]


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--preview", "{}/preview.png"]])
def test_each_input_is_read_once_to_look_at_it(case, arguments):
    with reads(case) as opened:
        case.finish(*(each.format(case.folder) for each in arguments))
    assert opened == dict.fromkeys(inputs(case), 1)


@pytest.mark.parametrize("fit", ["crop", "region"])
def test_each_input_is_read_once_to_plan_and_once_to_work(case, fit):
    case.dataset["fit"] = fit
    moments: list[dict[str, int]] = []
    with reads(case) as opened, evaluations(at=1, do=lambda: moments.append(dict(opened))):
        case.finish()
    first = [str(case.folder / kind / "000000.png") for kind in ("gts", "masks")]
    assert moments == [{path: 2 if path in first else 1 for path in inputs(case)}]
    assert opened == dict.fromkeys(inputs(case), 2)


def test_a_mask_for_all_is_read_once_to_plan_and_a_finished_run_decodes_nothing(case):
    case.dataset["mask_path"] = str(case.folder / "masks" / "000000.png")
    with reads(case) as opened:
        case.finish("--dry-run")
    assert opened[case.dataset["mask_path"]] == 1
    case.finish()
    with (
        reads(case) as opened,
        patch("guided_diffusion.images.files.Image.open", pytest.fail),
        patch.object(UNet, "forward", pytest.fail),
    ):
        assert case.run().status == 0
    assert set(opened.values()) == {1}


def test_the_bytes_that_are_digested_are_those_that_are_decoded(case):
    """A file that is replaced as soon as it was read changes nothing."""
    expected = case.finish()
    case.write_to("again")
    read = worker.read_pair

    def replace_after_reading(pair):
        files = read(pair)
        shutil.copy(pair.mask_path, pair.image_path)
        return files

    with patch.object(worker, "read_pair", replace_after_reading):
        case.finish()
    for name, picture in case.written().items():
        assert (picture == expected[name]).all()


# ---- A run of before --------------------------------------------------------------------------


def test_a_run_that_an_earlier_version_began_goes_on(case):
    """Of two images, it had finished one, and saved a state after 3 of 5 evaluations of the other.

    Written by commit 38d6b5d, when modules still lay flat.
    """
    before = Path(__file__).parent / "earlier_run"
    shutil.copytree(before, case.out)
    (state,) = (case.out / "inpainted.run" / "unfinished").iterdir()
    with evaluations() as sizes:
        result = case.run()
    assert result.status == 0 and result.lines("warning") == []
    assert "1 of 2 are finished and skipped" in result.out
    assert len(sizes) == EVALUATIONS - 3
    first = "inpainted/000000.png"
    assert (case.out / first).read_bytes() == (before / first).read_bytes()
    assert sorted(case.written()) == ["000000.png", "000001.png"] and not state.exists()
