"""How well samplers choose among many possible answers, where their probabilities are known.

The data are a mixture of Gaussians N(x_k, s² I) around K = 200 drawn portraits of 16x16 pixels, so
the ideal network and the distribution of the hidden pixels given the known ones have closed forms.
Eight noisy portraits are inpainted 32 times each. Prints a table:

    python tests/exact_mixture.py
    python tests/exact_mixture.py --paper    # RePaint's setting as well: 2,410 evaluations, slow
    python tests/exact_mixture.py --json

TV: total variation between the portraits that the samples belong to and the true probabilities; the
row "exact" shows what so few samples have at least. ok: share of samples that belong to a portrait
with a probability above 0.001. res: variance of the samples around their portraits, over the true
one; below 1 they are too smooth.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from make_portraits import draw_portrait  # noqa: E402  (after the path is set)

from guided_diffusion.config import LangevinConfig, ScheduleConfig  # noqa: E402
from guided_diffusion.gaussian_diffusion import ReverseStep, at, beta_schedule  # noqa: E402
from guided_diffusion.langevin import langevin  # noqa: E402
from guided_diffusion.repaint import repaint  # noqa: E402
from guided_diffusion.respace import respaced_process  # noqa: E402
from guided_diffusion.scheduler import count_evaluations, jump_times, langevin_levels  # noqa: E402
from guided_diffusion.streams import Known, Streams  # noqa: E402

SIDE, PORTRAITS = 16, 200
OBSERVATIONS, SAMPLES = 8, 32  # of each observation
SETTINGS = (("centre", 0.6), ("centre", 0.3), ("half", 0.6))  # what is known, s
BUDGETS = (16, 32, 48, 100)  # evaluations of langevin
PAPER = ScheduleConfig(t_T=250, n_sample=1, jump_length=10, jump_n_sample=10)
BETAS = beta_schedule("linear", 1000)


@dataclass(frozen=True)
class Scores:
    """How near samples are to the truth, see above."""

    tv: float
    ok: float
    res: float


@cache
def portraits() -> torch.Tensor:
    """The centres x_k, (K, 3 · SIDE · SIDE), in [-1, 1]."""
    drawn = (draw_portrait(0, i).resize((SIDE, SIDE), Image.BOX) for i in range(PORTRAITS))
    pixels = np.stack([np.asarray(portrait, dtype=np.float32) for portrait in drawn])
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).flatten(1)


def known_pixels(name: str) -> torch.Tensor:
    """(3 · SIDE · SIDE,) bool: the middle 6x6 pixels, or the left half."""
    known = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    if name == "centre":
        known[:, 5:11, 5:11] = True
    else:
        known[:, :, : SIDE // 2] = True
    return known.flatten()


class Task:
    """Observations of noisy portraits, and the true answer."""

    def __init__(self, known: str, std: float):
        """known: see `known_pixels`. std: s, of the mixture's Gaussians."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(0, PORTRAITS, (OBSERVATIONS,), generator=generator)
        noise = torch.randn(OBSERVATIONS, 3 * SIDE * SIDE, generator=generator)
        observed = portraits()[chosen] + std * noise
        self.std, self.known = std, known_pixels(known)
        self.probabilities = self._responsibilities(observed, self.known)  # (OBSERVATIONS, K)
        self.y = observed.repeat_interleave(SAMPLES, 0)

    def _responsibilities(self, x: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Probabilities of the portraits, given these pixels of x: (B, K)."""
        distances = torch.cdist(x[:, pixels], portraits()[:, pixels]) ** 2
        return torch.softmax(-distances / (2 * self.std**2), 1)

    def predict_x0(self, x: torch.Tensor, abar: float) -> torch.Tensor:
        """E[x_0 | x_t] for x_t (B, 3, SIDE, SIDE): what training tends to."""
        z, variance = x.flatten(1) / math.sqrt(abar), self.std**2 + 1 / abar - 1
        centres = portraits()
        weights = torch.softmax((z @ centres.T - centres.square().sum(1) / 2) / variance, 1)
        mean = weights @ centres
        return (mean + self.std**2 / variance * (z - mean)).view_as(x)

    def images(self) -> Known:
        """The known pixels, the others black, and the keep mask: both (B, 3, SIDE, SIDE)."""
        shape = (len(self.y), 3, SIDE, SIDE)
        known = self.known.float().expand_as(self.y)
        return Known((self.y * known).view(shape), known.reshape(shape))

    def score(self, samples: torch.Tensor) -> Scores:
        """samples: (B, 3, SIDE, SIDE), SAMPLES in a row for each observation."""
        x = samples.flatten(1)
        belongs = self._responsibilities(x, ~self.known)  # (B, K)
        shares = belongs.view(OBSERVATIONS, SAMPLES, PORTRAITS).mean(1)
        nearest = belongs.argmax(1)
        true = self.probabilities.repeat_interleave(SAMPLES, 0).gather(1, nearest[:, None])
        residual = (x - portraits()[nearest])[:, ~self.known]
        return Scores(
            tv=(shares - self.probabilities).abs().sum(1).mean().item() / 2,
            ok=(true > 1e-3).float().mean().item(),
            res=residual.square().mean().item() / self.std**2,
        )


def draw_exactly(task: Task) -> torch.Tensor:
    """Samples of the truth."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.multinomial(task.probabilities, SAMPLES, replacement=True, generator=generator)
    noise = torch.randn(task.y.shape, generator=generator)
    return portraits()[chosen.flatten()] + task.std * noise


def draw_langevin(task: Task, evaluations: int) -> torch.Tensor:
    """Samples of the quick sampler."""
    abar, known, streams = np.cumprod(1 - BETAS), task.images(), Streams(range(len(task.y)))
    levels = langevin_levels(LangevinConfig(evaluations=evaluations), abar)
    z = known.pixels + levels[0].sigma * streams.normal(known.pixels)
    return langevin(
        lambda x, t: task.predict_x0(x, float(abar[t])), levels, z, streams, known=known
    )


def draw_repaint(task: Task) -> torch.Tensor:
    """Samples of RePaint in the paper's setting, with the posterior's variance."""
    diffusion = respaced_process(BETAS, str(PAPER.t_T)).diffusion

    def denoise(x: torch.Tensor, t: int) -> ReverseStep:
        x0 = task.predict_x0(x, float(diffusion.alphas_cumprod[t]))
        log_variance = at(diffusion.tables.posterior_log_variance_clipped, t)
        return ReverseStep(diffusion.posterior_mean(x0, x, t), log_variance, x0)

    known, streams = task.images(), Streams(range(len(task.y)))
    x = streams.normal(known.pixels)
    return repaint(denoise, diffusion, jump_times(PAPER), x, streams, known=known)


def rows(paper: bool) -> Iterator[tuple[str, int, list[Scores]]]:
    """(sampler, evaluations, scores in each of the SETTINGS)."""
    tasks = [Task(*setting) for setting in SETTINGS]
    yield "exact", 0, [task.score(draw_exactly(task)) for task in tasks]
    for budget in BUDGETS:
        cost = len(langevin_levels(LangevinConfig(evaluations=budget), np.cumprod(1 - BETAS))) - 1
        yield "Langevin", cost, [task.score(draw_langevin(task, budget)) for task in tasks]
    if paper:
        scores = [task.score(draw_repaint(task)) for task in tasks]
        yield "RePaint, the paper's setting", count_evaluations(jump_times(PAPER)), scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Score samplers on a mixture of portraits.")
    parser.add_argument("--paper", action="store_true", help="RePaint too, which is slow")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    arguments = parser.parse_args()
    found = rows(arguments.paper)
    if arguments.json:
        names = [f"{known}, s = {std}" for known, std in SETTINGS]
        print(json.dumps([_record(names, *row) for row in found], indent=2))
        return
    heads = [f"{known} known, s = {std}: TV, ok, res" for known, std in SETTINGS]
    print("| sampler | evaluations | " + " | ".join(heads) + " |")
    print("| --- | ---: |" + " --- |" * len(SETTINGS))
    for name, cost, scores in found:
        cells = [f"{score.tv:.3f}, {score.ok:.2f}, {score.res:.2f}" for score in scores]
        print(f"| {name} | {cost:,} | " + " | ".join(cells) + " |", flush=True)


def _record(names: list[str], name: str, cost: int, scores: list[Scores]) -> dict[str, object]:
    settings = {setting: asdict(score) for setting, score in zip(names, scores, strict=True)}
    return {"sampler": name, "evaluations": cost, "settings": settings}


if __name__ == "__main__":
    main()
