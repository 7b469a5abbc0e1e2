"""A case of `test.py`: inputs, a config that runs them in a moment, and its results."""

import contextlib
import gc
import io
import json
import runpy
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]


GOLDEN = ROOT / "tests" / "golden"


INPUTS = GOLDEN / "e2e" / "resample"


SIZE = 32


OUTPUTS = {
    "srs": "inpainted",
    "lrs": "gt_masked",
    "gts": "gt",
    "gt_keep_masks": "gt_keep_mask",
}


EVALUATIONS = 5  # of SCHEDULE: times 2 1, up to 2, 1 0, up to 1, 0


SCHEDULE = {"t_T": 3, "n_sample": 1, "jump_length": 1, "jump_n_sample": 2}


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    def lines(self, kind: str) -> list[str]:
        """Lines of stderr that are an `error` or a `warning`."""
        return [line for line in self.err.splitlines() if line.startswith(f"{kind}: ")]


def command(*arguments: str) -> Result:
    """What `python test.py ARGUMENTS` does, in this process: no seconds to import torch."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["test.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),  # which puts back the showwarning that test.py replaces
        pytest.raises(SystemExit) as exit_,
    ):
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)  # as Python does for a user
        runpy.run_path(str(ROOT / "test.py"), run_name="__main__")
    status = exit_.value.code
    if status:
        gc.collect()  # a process that ends lets go of its lock; here, an error may still hold it
    return Result(status, out.getvalue(), err.getvalue())


class Case:
    """A folder with a few of the golden inputs, and a config that is quick to run."""

    def __init__(self, folder: Path, images: int = 2):
        self.folder = folder
        for kind in ("gts", "masks"):
            (folder / kind).mkdir(parents=True)
            for path in sorted((INPUTS / kind).iterdir())[:images]:
                shutil.copy(path, folder / kind)
        self.config = yaml.safe_load((INPUTS / "conf.yml").read_text())
        self.config |= {
            "model_path": str(GOLDEN / "tiny32.pt"),
            "timestep_respacing": "3",
            "schedule_jump_params": dict(SCHEDULE),
            "device": "cpu",
        }
        self.dataset = self.config["data"]["eval"]["resample"]
        self.dataset |= {"gt_path": str(folder / "gts"), "mask_path": str(folder / "masks")}
        self.write_to("out")

    def write_to(self, name: str) -> None:
        self.out = self.folder / name
        self.dataset["paths"] = {key: str(self.out / path) for key, path in OUTPUTS.items()}

    def conf_path(self) -> str:
        path = self.folder / "conf.yml"
        path.write_text(yaml.safe_dump(self.config))
        return str(path)

    def run(self, *arguments: str) -> Result:
        return command("--conf_path", self.conf_path(), *arguments)

    def finish(self, *arguments: str) -> dict[str, np.ndarray]:
        """Run to the end; name -> inpainted picture."""
        result = self.run(*arguments)
        assert (result.status, result.lines("error")) == (0, [])
        return self.written()

    def written(self, kind: str = "inpainted") -> dict[str, np.ndarray]:
        folder = self.out / kind
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in paths}

    def record(self) -> dict:
        return json.loads((self.out / "run.json").read_text())

    def tree(self) -> dict[str, bytes | None]:
        """Every file and folder, with contents."""
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, picture in ours.items():
        np.testing.assert_array_equal(picture, theirs[name])
