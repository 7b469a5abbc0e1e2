"""What latent diffusion takes for large pictures: memory of the whole command, and seconds.

For each side, a fresh process does what `test.py` does with one square picture, whose middle is
hidden. The networks have the published shapes and random weights, and are computed on the CPU.
Memory does not depend on the number of evaluations, so that one is enough.

    python tests/latent_memory.py --side 256 1024 2048
    python tests/latent_memory.py --side 2048 --precision bf16
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.benchmark.setup import networks_of, peak_memory, random_checkpoint
from guided_diffusion.config import load_config
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.networks.unet import UNet

TEST = Path(__file__).resolve().parents[1] / "test.py"
CPU = torch.device("cpu")
TIMED = {  # in the order in which they are called
    "encode": (Autoencoder, "encode"),
    "evaluation": (UNet, "forward"),
    "decode": (Autoencoder, "decode"),
}
Seconds = Mapping[str, list[float]]  # of each call, by the keys of TIMED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--side", type=int, nargs="+", default=[2048], metavar="N", help="pixels (2048)")
    add("--precision", default="fp32", metavar="P", help="fp32, bf16 or fp16 (fp32)")
    add("--steps", type=int, default=1, metavar="N", help="evaluations of a picture (1)")
    arguments = parser.parse_args()
    keys = {"precision": arguments.precision, "ddim_steps": arguments.steps}
    print("| side | precision | peak memory, GB | encode, s | an evaluation, s | decode, s |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for side, (seconds, peak) in measure(arguments.side, keys):
        times = " | ".join(f"{min(seconds[name]):.1f}" for name in TIMED)
        print(f"| {side} | {arguments.precision} | {peak / 1e9:.2f} | {times} |", flush=True)


def measure(sides: list[int], keys: Mapping[str, Any]) -> Iterator[tuple[int, tuple[Seconds, int]]]:
    """For each side: the seconds of all calls, and the bytes that the process held at most.

    keys: of the config, with those of other shapes if need be.
    """
    with tempfile.TemporaryDirectory() as folder:
        conf_path = Path(folder, "config.yml")
        write_config(conf_path, keys)
        config = load_config(str(conf_path), require_data=False)
        with random_checkpoint(networks_of(config)) as path:
            for side in sides:
                draw(Path(folder), side)
                settings = [f"model_path={path}"]
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    yield side, fresh.submit(inpaint, str(conf_path), settings).result()


def write_config(path: Path, keys: Mapping[str, Any]) -> None:
    """A config of the picture that `draw` makes; JSON is YAML too."""
    kinds = {"gts": "gt", "lrs": "gt_masked", "srs": "inpainted", "gt_keep_masks": "masks"}
    dataset = {
        "gt_path": str(path.with_name("image.png")),
        "mask_path": str(path.with_name("mask.png")),
        "paths": {kind: str(path.parent / "out" / name) for kind, name in kinds.items()},
    }
    run = {"method": "latent", "model_path": "none.ckpt", "device": "cpu", "image_size": None}
    data = {"data": {"eval": {"one": dataset}}, "show_progress": False}
    path.write_text(json.dumps(run | data | keys))


def draw(folder: Path, side: int) -> None:
    """A picture of noise, and a mask that hides the quarter in its middle."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    mask = Image.new("L", (side, side), 255)
    mask.paste(0, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    mask.save(folder / "mask.png")


def inpaint(conf_path: str, settings: list[str]) -> tuple[Seconds, int]:
    """Do in this process what `test.py` does; see `measure`."""
    arguments = ["test.py", "--conf_path", conf_path, "--overwrite", "--set", *settings]
    with timed() as seconds, patch.object(sys, "argv", arguments):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(TEST), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"test.py ended with status {end.code}") from end
    return seconds, peak_memory(CPU)


@contextlib.contextmanager
def timed() -> Iterator[Seconds]:
    """The seconds of all calls meanwhile."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def watched(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: object) -> torch.Tensor:
            begun = time.perf_counter()
            result = function(*arguments)
            seconds[name].append(time.perf_counter() - begun)
            return result

        return call

    with contextlib.ExitStack() as patches:
        for name, (owner, method) in TIMED.items():
            watch = watched(name, getattr(owner, method))
            patches.enter_context(patch.object(owner, method, watch))
        yield seconds


if __name__ == "__main__":
    main()
