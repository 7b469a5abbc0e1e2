"""Tables, respacing, q and p of the diffusion, against golden numbers and plain algebra."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, at, beta_schedule
from guided_diffusion.respace import respace_betas, respaced_process, space_timesteps

GOLDEN = Path(__file__).parent / "golden"
RESPACINGS = json.loads((GOLDEN / "respacing.json").read_text())
TABLES = {  # name in the golden file -> name here
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance_clipped",
    "posterior_mean_coef1": "posterior_mean_coef_x0",
    "posterior_mean_coef2": "posterior_mean_coef_xt",
}
FACTORS = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")  # of predict_x0
TWO_STEPS = [0.1, 0.2]  # their ᾱ: 0.9, 0.72; their posterior variance at t = 1: 1/14


@pytest.fixture(scope="module")
def golden_tables():
    with np.load(GOLDEN / "diffusion_tables.npz") as tables:
        return dict(tables)


def image(*values: float) -> torch.Tensor:
    """(1, C, 1, 1), a channel for each value."""
    return torch.tensor(values).view(1, -1, 1, 1)


# ---- Noise schedules -------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "first", "last"), [(1000, 1e-4, 0.02), (250, 4e-4, 0.08)])
def test_linear_betas_are_evenly_spaced_and_scaled_by_the_number_of_steps(steps, first, last):
    betas = beta_schedule("linear", steps)
    assert betas.dtype == np.float64
    assert (betas[0], betas[-1]) == pytest.approx((first, last), rel=1e-12)
    np.testing.assert_allclose(np.diff(betas), (last - first) / (steps - 1), rtol=1e-9)


def test_cosine_betas_have_the_cosines_square_as_their_product():
    betas = beta_schedule("cosine", 100)
    assert betas.dtype == np.float64

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [abar((i + 1) / 100) / abar(0) for i in range(99)]
    np.testing.assert_allclose(np.cumprod(1 - betas)[:99], expected, rtol=1e-12)
    assert betas[-1] == 0.999  # of ᾱ(1) = 0 the formula would make 1


def test_an_unknown_noise_schedule_is_refused():
    with pytest.raises(ValueError, match="'square' is neither 'linear' nor 'cosine'"):
        beta_schedule("square", 1000)


# ---- Respacing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", RESPACINGS, ids=lambda c: f"{c['num_timesteps']}-{c['section_counts']}"
)
def test_respacing_keeps_the_golden_steps(case):
    assert space_timesteps(case["num_timesteps"], case["section_counts"]) == case["steps"]


def test_an_empty_respacing_keeps_every_step():
    assert space_timesteps(5, "") == [0, 1, 2, 3, 4]


def test_the_first_sections_are_longer_where_the_division_leaves_a_rest():
    assert space_timesteps(11, "4,4,3") == list(range(11))  # sections of 4, 4 and 3 steps
    assert space_timesteps(11, "2,2,2") == [0, 3, 4, 7, 8, 10]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("11", "cannot take 11 steps from a section of 10"),
        ("1,6", "cannot take 6 steps from a section of 5"),
        ("ddim7", "no whole stride takes exactly 7 of 10 steps"),
        ("ddim11", "no whole stride takes exactly 11 of 10 steps"),
    ],
)
def test_a_respacing_that_does_not_fit_is_refused(respacing, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(10, respacing)


def test_respaced_betas_leave_the_kept_steps_as_noisy_as_they_were():
    betas, steps = beta_schedule("linear", 1000), [3, 500, 999]
    kept = np.cumprod(1 - respace_betas(betas, steps))
    np.testing.assert_allclose(kept, np.cumprod(1 - betas)[steps], rtol=1e-12)


def test_rescaled_times_count_as_if_the_base_process_had_1000_steps():
    betas = beta_schedule("linear", 300)
    plain = respaced_process(betas, "3")
    rescaled = respaced_process(betas, "3", rescale_timesteps=True)
    assert plain.network_times.tolist() == [0, 150, 299]
    torch.testing.assert_close(rescaled.network_times, torch.tensor([0, 500, 299 / 0.3]))
    assert (rescaled.diffusion.betas == plain.diffusion.betas).all()


# ---- Tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "respacing"),
    [("t1000", ""), ("t250", "250"), ("t100", "100"), ("t20", "20"), ("sections", "25,50,100")],
)
def test_tables_equal_the_golden_ones(golden_tables, name, respacing):
    process = respaced_process(beta_schedule("linear", 1000), respacing)
    diffusion = process.diffusion
    for theirs, ours in TABLES.items():
        table = getattr(diffusion, ours)
        assert table.dtype == np.float64
        np.testing.assert_allclose(
            table, golden_tables[f"{name}.{theirs}"], rtol=1e-10, err_msg=ours
        )
    for factor in FACTORS:
        table = getattr(diffusion.tables, factor)
        expected = golden_tables[f"{name}.{factor}"].astype(np.float32)
        np.testing.assert_allclose(table, expected, rtol=2e-7, err_msg=factor)
    assert process.network_times.dtype == torch.float32
    assert process.network_times.tolist() == golden_tables[f"{name}.timestep_map"].tolist()


def test_tables_meet_tensors_in_float32_and_broadcast_over_images():
    diffusion = GaussianDiffusion(TWO_STEPS)
    one, both = at(diffusion.tables.betas, 1), at(diffusion.tables.betas, torch.tensor([1, 0]))
    assert (one.dtype, one.shape, one.item()) == (torch.float32, (1, 1, 1, 1), np.float32(0.2))
    assert both.shape == (2, 1, 1, 1)
    assert both.flatten().tolist() == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("betas", [[0.0, 0.1], [-0.1], [1.1], [[0.1]], [math.nan]])
def test_betas_that_are_no_variances_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas must be a row of numbers in \(0, 1\]"):
        GaussianDiffusion(betas)


def test_a_single_step_has_its_log_variance_floored():
    diffusion = GaussianDiffusion([0.3])
    assert diffusion.posterior_variance.tolist() == [0]
    assert diffusion.posterior_log_variance_clipped == pytest.approx([math.log(1e-20)])
    assert diffusion.fixed_log_variance == pytest.approx([math.log(1e-20)])


# ---- q: the forward process and its posterior -------------------------------------------------


def chain(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, L) of x = a·x_0 + L·ε, for x = x_0 … x_N, each sqrt(1 − β) the last + sqrt(β) ε."""
    a, noise = [1.0], [np.zeros(len(betas))]
    for t, beta in enumerate(betas):
        a.append(math.sqrt(1 - beta) * a[-1])
        noise.append(math.sqrt(1 - beta) * noise[-1])
        noise[-1][t] = math.sqrt(beta)
    return np.array(a), np.stack(noise)


def test_q_sample_and_posterior_are_those_of_the_joint_gaussian():
    betas = np.linspace(0.05, 0.4, 6)
    diffusion = GaussianDiffusion(betas)
    a, noise = chain(betas)
    cov = noise @ noise.T
    x0, x_t = 0.7, -1.3
    for t in range(6):  # time t is the chain's variable t + 1
        now, before = t + 1, t
        sampled = diffusion.q_sample(image(x0), t, image(1.0)).item()
        assert sampled == pytest.approx(a[now] * x0 + math.sqrt(cov[now, now]), rel=1e-6)

        gain = cov[before, now] / cov[now, now]
        mean = a[before] * x0 + gain * (x_t - a[now] * x0)
        variance = cov[before, before] - gain * cov[now, before]
        computed = diffusion.posterior_mean(image(x0), image(x_t), t).item()
        assert computed == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert diffusion.posterior_variance[t] == pytest.approx(variance, rel=1e-9, abs=1e-15)


def test_the_noise_of_a_sample_leads_back_to_its_x0():
    diffusion = GaussianDiffusion(beta_schedule("linear", 50))
    torch.manual_seed(0)
    x0, noise, t = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 20, 49])
    x_t = diffusion.q_sample(x0, t, noise)
    torch.testing.assert_close(diffusion.predict_x0(x_t, t, noise), x0, atol=1e-4, rtol=0)


# ---- p: one step back, from a network's output ------------------------------------------------


def test_a_predicted_noise_becomes_the_mean_by_hand():
    p = GaussianDiffusion(TWO_STEPS).reverse_step(image(0.5), image(0.6), 1)
    x0 = (0.6 - math.sqrt(0.28) * 0.5) / math.sqrt(0.72)
    assert p.pred_x0.item() == pytest.approx(x0, rel=1e-6)
    mean = (math.sqrt(0.9) * 0.2 * x0 + math.sqrt(0.8) * 0.1 * 0.6) / 0.28
    assert p.mean.item() == pytest.approx(mean, rel=1e-6)


def test_at_the_last_step_the_mean_is_the_predicted_x0():
    p = GaussianDiffusion(TWO_STEPS).reverse_step(image(0.5), image(0.6), 0, predict_xstart=True)
    assert p.mean.item() == pytest.approx(0.5, rel=1e-6)


def test_the_predicted_x0_is_clamped_before_the_mean_unless_told_otherwise():
    diffusion = GaussianDiffusion(TWO_STEPS)
    output, x_t = image(-3.0, 0.5, 2.0), image(0.0, 0.0, 0.0)
    clipped = diffusion.reverse_step(output, x_t, 1, predict_xstart=True)
    free = diffusion.reverse_step(output, x_t, 1, predict_xstart=True, clip_denoised=False)
    assert clipped.pred_x0.flatten().tolist() == [-1.0, 0.5, 1.0]
    assert free.pred_x0.flatten().tolist() == [-3.0, 0.5, 2.0]
    factor = math.sqrt(0.9) * 0.2 / 0.28
    for p in (clipped, free):
        torch.testing.assert_close(p.mean, factor * p.pred_x0)


@pytest.mark.parametrize(("t", "variance"), [(0, 1 / 14), (1, 0.2)])
def test_without_a_learned_variance_it_is_beta_but_for_the_first_step(t, variance):
    p = GaussianDiffusion(TWO_STEPS).reverse_step(image(0.0, 0.0), image(0.0, 0.0), t)
    assert p.variance.item() == pytest.approx(variance, rel=1e-6)
    assert p.sigma.item() == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize(
    ("v", "variance"),
    [(-1.0, 1 / 14), (1.0, 0.2), (0.0, math.sqrt(0.2 / 14)), (-0.5, 0.2**0.25 * 14**-0.75)],
)
def test_a_learned_variance_lies_between_the_posteriors_and_beta_in_logarithms(v, variance):
    """The output's second half is v; its first half alone is the prediction."""
    p = GaussianDiffusion(TWO_STEPS).reverse_step(
        image(0.3, -0.3, v, v), image(0.0, 0.0), 1, predict_xstart=True
    )
    assert p.pred_x0.flatten().tolist() == pytest.approx([0.3, -0.3])
    assert p.variance.flatten().tolist() == pytest.approx([variance] * 2, rel=1e-5)
