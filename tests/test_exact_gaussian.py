"""The sampler on Gaussian images: its moments, exactly, and how they approach the truth.

With `BalancedNoise` the loop's moments carry no sampling error, only that of float32 (about 1e-5).
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from guided_diffusion.scheduler import plain_times
from guided_diffusion.streams import Streams
from tests import exact_gaussian
from tests.exact_gaussian import (
    DATA,
    IMAGE,
    KNOWN,
    PIXELS,
    TRUTH,
    BalancedNoise,
    Gaussian,
    distance,
    inpainted,
    inpainting_error,
    new_diffusion,
    sample,
    times_for,
)


def algorithm_1(times: list[int]) -> Gaussian:
    """The moments of x_0 by Algorithm 1 of the paper, step by step in float64.

    Everything comes from ᾱ and the rules for Gaussians; nothing from the code under test.
    """
    abar = np.append(new_diffusion().alphas_cumprod, 1.0)  # ᾱ_{−1} = 1
    eye = np.eye(PIXELS)
    mean, cov = np.zeros(PIXELS), eye
    for i, (t, u) in enumerate(pairwise(times)):
        if u > t:  # x_u ~ q(x_u | x_t)
            alpha = abar[u] / abar[t]
            mean, cov = np.sqrt(alpha) * mean, alpha * cov + (1 - alpha) * eye
            continue
        if i > 0:
            mean = np.where(KNOWN, np.sqrt(abar[t]) * IMAGE, mean)
            cov = np.where(np.outer(~KNOWN, ~KNOWN), cov, 0) + (1 - abar[t]) * np.diag(KNOWN)
        # E[x_0 | x_t] = μ + gain (x_t − √ᾱ μ)
        gain = np.sqrt(abar[t]) * DATA.cov @ np.linalg.inv(abar[t] * DATA.cov + (1 - abar[t]) * eye)
        pred_x0 = DATA.mean + gain @ (mean - np.sqrt(abar[t]) * DATA.mean)
        if u == -1:
            return Gaussian(pred_x0, gain @ cov @ gain.T)
        # q(x_u | x_t, x_0): the product of q(x_u | x_0) and q(x_t | x_u), by their precisions
        alpha = abar[t] / abar[u]
        variance = 1 / (alpha / (1 - alpha) + 1 / (1 - abar[u]))
        c0 = variance * np.sqrt(abar[u]) / (1 - abar[u])
        ct = variance * np.sqrt(alpha) / (1 - alpha)
        step = c0 * gain + ct * eye
        x0_cov = DATA.cov - np.sqrt(abar[t]) * gain @ DATA.cov
        mean = c0 * pred_x0 + ct * mean
        cov = step @ cov @ step.T + np.diag(variance + c0**2 * np.diag(x0_cov))
    raise ValueError("the times do not end with -1")


def test_the_truth_is_what_the_precision_matrix_says():
    precision = np.linalg.inv(DATA.cov)
    hidden = np.linalg.inv(precision[np.ix_(~KNOWN, ~KNOWN)])
    shift = precision[np.ix_(~KNOWN, KNOWN)] @ (IMAGE - DATA.mean)[KNOWN]
    np.testing.assert_allclose(TRUTH.cov, hidden, atol=1e-12)
    np.testing.assert_allclose(TRUTH.mean, DATA.mean[~KNOWN] - hidden @ shift, atol=1e-12)


def test_the_divergence_is_torch_s():
    def as_torch(gaussian: Gaussian) -> torch.distributions.MultivariateNormal:
        mean, cov = torch.from_numpy(gaussian.mean), torch.from_numpy(gaussian.cov)
        return torch.distributions.MultivariateNormal(mean, cov)

    prior = DATA.marginal(~KNOWN)
    expected = torch.distributions.kl_divergence(as_torch(prior), as_torch(TRUTH)).item()
    assert distance(prior, TRUTH).kl == pytest.approx(expected)


def test_free_sampling_draws_the_data():
    """What is left is the price of 250 steps with variances pixel by pixel, 2 % of Σ."""
    free = sample(plain_times(250), BalancedNoise(0), BalancedNoise.BATCH, merge_known=False)
    remaining = distance(free, DATA)
    assert remaining.mean < 1e-4
    assert remaining.cov < 0.025
    assert remaining.kl < 0.006


@pytest.mark.parametrize("r", [1, 5, 10])
def test_the_loop_is_algorithm_1(r):
    expected = algorithm_1(times_for(r))
    np.testing.assert_allclose(inpainted(r).mean, expected.mean, atol=2e-5)
    np.testing.assert_allclose(inpainted(r).cov, expected.cov, atol=2e-5)


def test_independent_noise_has_the_same_moments_within_sampling_error():
    """Twice n times the divergence of n samples' moments follows about χ² with 44 degrees.

    That is 8 means and 36 covariances: 44 ± 9.4.
    """
    n = 400
    independent = sample(times_for(1), Streams(range(n)), n).marginal(~KNOWN)
    divergence = distance(independent, inpainted(1).marginal(~KNOWN)).kl
    assert 44 - 4 * 9.4 < 2 * n * divergence < 44 + 4 * 9.4


def test_resampling_approaches_the_truth():
    once, five, ten = (inpainting_error(r) for r in (1, 5, 10))
    assert once.mean > 0.3 and once.cov > 0.6 and once.kl > 1.2
    assert five.mean < 0.13 and five.cov < 0.16 and five.kl < 0.28
    assert ten.mean < five.mean and ten.cov < 0.9 * five.cov and ten.kl < 0.97 * five.kl


def test_shorter_jumps_end_nearer_to_the_truth():
    """Where r is large enough, j alone decides how far off the samples stay."""
    assert inpainting_error(10, j=5).kl < inpainting_error(10).kl / 3
    assert inpainting_error(10, j=1).kl < inpainting_error(10).kl / 10


def test_the_table_has_a_row_for_each_setting(capsys):
    exact_gaussian.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[2:5]] == [
        ["1", "10", "250"],
        ["5", "10", "1,210"],
        ["10", "10", "2,410"],
    ]
    assert [row[0] for row in rows[7:]] == ["Langevin"] * 5
    assert {len(row) for row in rows} == {6}
