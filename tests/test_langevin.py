"""The quick sampler against recursions and distributions that are known exactly."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from guided_diffusion.config import LangevinConfig
from guided_diffusion.gaussian_diffusion import beta_schedule
from guided_diffusion.langevin import FADE, langevin
from guided_diffusion.scheduler import Level, langevin_levels
from guided_diffusion.streams import Known, Streams, begin
from tests.exact_gaussian import (
    DATA,
    IMAGE,
    KNOWN,
    PIXELS,
    TRUTH,
    Gaussian,
    distance,
    langevin_error,
    langevin_inpainted,
    langevin_samples,
)

ATTRACTION = LangevinConfig().attraction
ABAR = {name: np.cumprod(1 - beta_schedule(name, 1000)) for name in ("linear", "cosine")}
SHAPE = (2, 3, 4, 4)


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def half() -> torch.Tensor:
    mask = torch.zeros(SHAPE)
    mask[..., :2] = 1
    return mask


def curved(x_t: torch.Tensor, t: int) -> torch.Tensor:
    """A network of a kind: neighbours matter, and it is not linear."""
    return torch.tanh(x_t + 0.5 * x_t.roll(1, -1) + t / 1000)


def levels_for(evaluations: int, alphas_cumprod: np.ndarray) -> list[Level]:
    return langevin_levels(LangevinConfig(evaluations=evaluations), alphas_cumprod)


def draw(predict_x0, levels, y, m, streams, *, start=None, **options) -> torch.Tensor:
    """Inpaint from noise around the known pixels, or from a first z."""
    z = m * y + levels[0].sigma * streams.normal(y) if start is None else start
    return langevin(predict_x0, levels, z, streams, known=Known(y, m), **options)


# ---- Levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ABAR)
@pytest.mark.parametrize("evaluations", [16, 17, 32, 48, 100, 333, 500])
def test_levels_cost_what_was_asked_for(schedule, evaluations):
    levels = levels_for(evaluations, ABAR[schedule])
    assert evaluations - 1 <= len(levels) - 1 <= evaluations
    seen = []
    x = picture()
    draw(lambda x_t, t: seen.append(t) or x_t, levels, x, half(), Streams([0, 1]))
    assert len(seen) == len(levels) - 1


@pytest.mark.parametrize("schedule", ABAR)
@pytest.mark.parametrize("evaluations", [16, 48, 500])
def test_levels_go_down_through_distinct_steps(schedule, evaluations):
    levels = levels_for(evaluations, ABAR[schedule])
    assert levels[-1] == Level(-1, 0.0)
    distinct = list(dict.fromkeys(levels))
    assert all(a.step > b.step and a.sigma > b.sigma for a, b in pairwise(distinct))
    for level in distinct[:-1]:
        abar = ABAR[schedule][level.step]
        assert level.sigma == pytest.approx(math.sqrt((1 - abar) / abar))
        assert levels.count(level) == (2 if 0.15 < level.sigma < 6 else 1)
    assert levels[0].sigma == pytest.approx(20, rel=0.03)
    assert levels[-2].sigma == pytest.approx(0.035, rel=0.15)


def test_few_levels_are_those_of_edm():
    levels = list(dict.fromkeys(levels_for(16, ABAR["linear"])))[:-1]
    i = np.arange(len(levels)) / (len(levels) - 1)
    expected = (20 ** (1 / 6) + i * (0.035 ** (1 / 6) - 20 ** (1 / 6))) ** 6
    np.testing.assert_allclose([level.sigma for level in levels], expected, rtol=0.1)


def test_short_processes_have_fewer_levels():
    levels = langevin_levels(
        LangevinConfig(evaluations=200), np.cumprod(1 - beta_schedule("linear", 50))
    )
    steps = [level.step for level in dict.fromkeys(levels)]
    assert steps == [*range(steps[0], -2, -1)]
    assert len(levels) - 1 < 200


# ---- The walk, by hand -------------------------------------------------------------------------


def test_one_step_of_each_kind_by_hand():
    """Two evaluations at σ = 2 and one at σ = 1, against the formulas for one number each."""
    levels = [Level(9, 2.0, 0.5, 0.7), Level(9, 2.0, 0.5, 0.7), Level(4, 1.0), Level(-1, 0.0)]
    y, m, start = picture(1), half(), 3 * picture(2)
    n = Streams([5, 6]).normal(y)

    def x0(z: torch.Tensor, sigma: float, t: int) -> torch.Tensor:
        return curved(z / math.sqrt(1 + sigma**2), t)

    seen = x0(start, 2, 9)
    hole = seen + math.exp(-0.5) * (start - seen) + 0.7 * n
    z = torch.where(m == 1, start + ATTRACTION * (y - seen), hole)
    seen = x0(z, 2, 9)
    known = y + 0.5**FADE * (z + ATTRACTION * (y - seen) - y)
    z = torch.where(m == 1, known, seen + 0.5 * (z - seen))
    expected = torch.where(m == 1, y, x0(z, 1, 4))
    drawn = draw(curved, levels, y, m, Streams([5, 6]), start=start)
    torch.testing.assert_close(drawn, expected)


def test_it_begins_with_noise_around_the_known_pixels():
    levels, y, m, seen = (
        levels_for(16, ABAR["linear"]),
        picture(),
        half(),
        [],
    )
    sigma = levels[0].sigma
    draw(lambda x_t, t: seen.append(x_t) or x_t, levels, y, m, Streams([0, 1]))
    expected = (m * y + sigma * Streams([0, 1]).normal(y)) / math.sqrt(1 + sigma**2)
    torch.testing.assert_close(seen[0], expected)


def down(sigmas: list[float]) -> list[Level]:
    """Levels without Langevin steps; step i has σ_i."""
    return [*(Level(i, sigma) for i, sigma in enumerate(sigmas)), Level(-1, 0.0)]


def test_without_langevin_steps_it_is_dpm_solver():
    """On a Gaussian pixel N(0, s²), x_0 = c z with c = s² / (s² + σ²)."""
    sigmas, s = [10.0, 4.0, 1.5, 0.6, 0.2], 0.5
    slopes = [s**2 / (s**2 + sigma**2) for sigma in sigmas]
    z, before = 10.0, None
    for i, (sigma, lower) in enumerate(pairwise([*sigmas, 0.0])):
        x0 = slopes[i] * z
        ahead = x0
        if before is not None and lower > 0:
            step, step_before = math.log(sigma / lower), math.log(sigmas[i - 1] / sigma)
            ahead = (1 + step / (2 * step_before)) * x0 - step / (2 * step_before) * before
        z, before = lower / sigma * z + (1 - lower / sigma) * ahead, x0

    def network(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return slopes[t] * x_t * math.sqrt(1 + sigmas[t] ** 2)

    zeros, start = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 10.0)
    drawn = draw(network, down(sigmas), zeros, zeros, Streams([0]), start=start)
    assert drawn.item() == pytest.approx(z, rel=1e-5)


def test_the_order_is_two():
    """Twice as many levels leave a quarter of the error of the ODE's solution."""

    def error(number: int) -> float:
        sigmas = list(np.geomspace(5.0, 0.5, number + 1))
        levels, ends = down(sigmas), []

        def network(x_t: torch.Tensor, t: int) -> torch.Tensor:
            return x_t * math.sqrt(1 + sigmas[t] ** 2) / (1 + sigmas[t] ** 2)

        zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        draw(
            network, levels, zeros, zeros, Streams([0]), start=zeros + 1,
            after_evaluation=lambda evaluation: ends.append(evaluation.x.item()),
        )  # fmt: skip
        exact = math.sqrt((1 + 0.5**2) / (1 + 5.0**2))
        return abs(ends[number - 1] - exact)

    assert 3.5 < error(200) / error(400) < 4.5
    assert 3.5 < error(400) / error(800) < 4.5


# ---- What every sampler of the house does ------------------------------------------------------


def test_known_pixels_come_back_as_they_were():
    y, m = picture(), half()
    drawn = draw(
        curved,
        levels_for(16, ABAR["cosine"]),
        y,
        m,
        Streams([0, 1]),
    )
    assert torch.equal(drawn[m == 1], y[m == 1])
    assert not torch.isclose(drawn[m == 0], y[m == 0]).all()


def test_soft_masks_blend():
    """Where half a pixel is known, the result is half the known pixel and half the network's."""
    y, m, evaluations = picture(), torch.full(SHAPE, 0.5), []
    drawn = draw(
        curved, levels_for(16, ABAR["cosine"]), y, m, Streams([0, 1]),
        after_evaluation=evaluations.append,
    )  # fmt: skip
    torch.testing.assert_close(drawn, 0.5 * y + 0.5 * evaluations[-1].pred_x0)


def test_an_image_does_not_depend_on_its_batch():
    levels, y, m = (
        levels_for(24, ABAR["linear"]),
        picture(),
        half(),
    )
    both = draw(curved, levels, y, m, Streams([3, 4]))
    alone = draw(curved, levels, y[1:], m[1:], Streams([4]))
    assert torch.equal(both[1:], alone)


def test_each_state_leads_to_the_same_bytes():
    levels, y, m, states = (
        levels_for(16, ABAR["linear"]),
        picture(),
        half(),
        [],
    )
    streams = Streams([3, 4])
    whole = draw(
        curved, levels, y, m, streams,
        after_evaluation=lambda evaluation: states.append(evaluation.state()),
    )  # fmt: skip
    assert [state.position for state in states] == [*range(1, len(levels))]
    for state in states:
        streams = Streams([0, 0])
        z, position = begin(streams, y, state)
        before = {"x0_before": state.x0_before, "position": position}
        again = langevin(curved, levels, z, streams, known=Known(y, m), **before)
        assert torch.equal(again, whole)


def test_what_after_evaluation_raises_stops_it():
    def stop(evaluation: object) -> None:
        raise KeyboardInterrupt

    levels = levels_for(16, ABAR["linear"])
    with pytest.raises(KeyboardInterrupt):
        draw(curved, levels, picture(), half(), Streams([0, 1]), after_evaluation=stop)


# ---- On Gaussian images ------------------------------------------------------------------------


def by_covariances(levels: list[Level]) -> Gaussian:
    """The moments of the result, step by step in float64; the state is (z, the x_0 before)."""
    eye, known = np.eye(PIXELS), KNOWN[:, None]
    mean = np.concatenate([np.where(KNOWN, IMAGE, 0), np.zeros(PIXELS)])
    cov = np.zeros((2 * PIXELS, 2 * PIXELS))
    cov[:PIXELS, :PIXELS] = levels[0].sigma ** 2 * eye
    y = np.where(KNOWN, IMAGE, 0)
    for i, (level, lower) in enumerate(pairwise(levels)):
        # x_0 = μ + gain (z − μ), as one matrix on the state, and a constant
        gain = DATA.cov @ np.linalg.inv(DATA.cov + level.sigma**2 * eye)
        z, before = np.eye(PIXELS, 2 * PIXELS), np.eye(PIXELS, 2 * PIXELS, PIXELS)
        x0, constant = gain @ z, DATA.mean - gain @ DATA.mean
        noise = np.zeros(PIXELS)
        pulled, pulled_constant = z - ATTRACTION * x0, ATTRACTION * (y - constant)
        if lower == level:
            decay = math.exp(-level.step_size)
            hole, hole_constant = decay * z + (1 - decay) * x0, (1 - decay) * constant
            noise = np.where(KNOWN, 0, level.noise**2)
        else:
            shrink, ahead, weight = lower.sigma / level.sigma, x0, 0.0
            if i > 0 and levels[i - 1] != level and lower.sigma > 0:
                weight = math.log(level.sigma / lower.sigma) / 2
                weight /= math.log(levels[i - 1].sigma / level.sigma)
                ahead = x0 + weight * (x0 - before)
            hole = shrink * z + (1 - shrink) * ahead
            hole_constant = (1 - shrink) * (1 + weight) * constant
            fade = shrink**FADE
            pulled, pulled_constant = fade * pulled, (1 - fade) * y + fade * pulled_constant
        step = np.vstack([np.where(known, pulled, hole), x0])
        constants = np.concatenate([np.where(KNOWN, pulled_constant, hole_constant), constant])
        mean, cov = step @ mean + constants, step @ cov @ step.T
        cov[:PIXELS, :PIXELS] += np.diag(noise)
    return Gaussian(mean[:PIXELS], cov[:PIXELS, :PIXELS])


@pytest.mark.parametrize("evaluations", [16, 48])
def test_its_moments_are_those_of_the_recursion(evaluations):
    expected = by_covariances(levels_for(evaluations, ABAR["linear"]))
    found = langevin_inpainted(evaluations)
    np.testing.assert_allclose(found.mean, expected.mean, atol=2e-4)
    np.testing.assert_allclose(found.cov, expected.cov, atol=2e-4)


def test_independent_noise_has_the_same_moments_within_sampling_error():
    """Twice n times the divergence of n samples' moments follows about χ² with 44 degrees."""
    n = 400
    rows = langevin_samples(16, Streams(range(n)), n)
    independent = Gaussian(rows.mean(axis=0), np.cov(rows.T, bias=True)).marginal(~KNOWN)
    divergence = distance(independent, langevin_inpainted(16).marginal(~KNOWN)).kl
    assert 44 - 4 * 9.4 < 2 * n * divergence < 44 + 4 * 9.4


def test_more_evaluations_come_nearer_to_the_truth():
    few, some, many = (langevin_error(evaluations).kl for evaluations in (16, 48, 200))
    assert few < 0.35 and some < 0.03 and many < 0.003
    assert few > 5 * some > 5 * many


def test_known_pixels_must_pull():
    """Without the attraction the hidden pixels hardly know of the others."""
    free = distance(langevin_inpainted(48, attraction=0.0).marginal(~KNOWN), TRUTH)
    assert free.kl > 20 * langevin_error(48).kl and free.mean > 0.2
