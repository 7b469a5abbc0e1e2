"""DDIM: its steps against closed forms, the whole loop against a slow one, and its settings."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import factory, load_inpainter
from guided_diffusion.config import ScheduleConfig, UserError
from guided_diffusion.denoiser import FiniteCheck, NonFiniteError, ddim, network_denoiser
from guided_diffusion.gaussian_diffusion import Ddim, GaussianDiffusion, beta_schedule
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.repaint import repaint
from guided_diffusion.respace import respaced_process
from guided_diffusion.scheduler import jump_times, plain_times
from guided_diffusion.streams import Streams
from tests import exact_samplers
from tests.exact_gaussian import inpainting_error

ROOT = Path(__file__).parents[1]
CONF = ROOT / "tests" / "golden" / "e2e" / "resample" / "conf.yml"
SIDE = 64
ABAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
JUMPS = {"t_T": 10, "n_sample": 1, "jump_length": 3, "jump_n_sample": 3}


def linear(steps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(beta_schedule("linear", steps))


def two_images() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)


# ---- A step ----------------------------------------------------------------------------------


def test_a_step_by_hand():
    """ᾱ = 0.9, 0.72; β = 0.1, 0.2; with η = 0.5 σ² = (1/4) · (1/14)."""
    x0, x_t = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -0.8)
    eps = (-0.8 - math.sqrt(0.72) * 0.3) / math.sqrt(0.28)
    p = Ddim(GaussianDiffusion([0.1, 0.2]), 0.5).step(x0, x_t, 1)
    expected = math.sqrt(0.9) * 0.3 + math.sqrt(0.1 - 1 / 56) * eps
    assert p.mean.item() == pytest.approx(expected, rel=1e-5)
    assert p.sigma.item() == pytest.approx(math.sqrt(1 / 56), rel=1e-5)
    assert torch.equal(p.pred_x0, x0)


def test_with_eta_1_and_every_step_it_is_the_ancestral_step_with_the_posteriors_variance():
    """q(x_{t-1} | x_t, x_0) ∝ q(x_{t-1} | x_0) q(x_t | x_{t-1}), by their precisions."""
    x0, x_t = two_images()
    steps = Ddim(linear(), 1.0)
    for t in (1, 2, 10, 300, 999):
        alpha, prev = ABAR[t] / ABAR[t - 1], ABAR[t - 1]
        variance = 1 / (1 / (1 - prev) + alpha / (1 - alpha))
        mean = variance * (
            math.sqrt(prev) / (1 - prev) * x0.double()
            + math.sqrt(alpha) / (1 - alpha) * x_t.double()
        )
        p = steps.step(x0, x_t, t)
        torch.testing.assert_close(p.mean.double(), mean, atol=5e-6, rtol=1e-5)
        assert p.variance.item() == pytest.approx(variance, rel=1e-5)
        torch.testing.assert_close(p.mean, linear().posterior_mean(x0, x_t, t), atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_last_step_ends_at_x0_without_noise(eta):
    x0, x_t = two_images()
    p = Ddim(linear(), eta).step(x0, x_t, 0)
    assert torch.equal(p.mean, x0)
    assert p.sigma.item() == 0


def test_without_eta_no_step_has_noise_and_all_is_finite():
    x0, x_t = two_images()
    steps = Ddim(linear(50))
    for t in range(50):
        p = steps.step(x0, x_t, t)
        assert p.sigma.item() == 0 and p.mean.isfinite().all()
        assert FiniteCheck(lambda x, t, p=p: p)(x_t, t) is p


def test_what_is_no_number_is_found_without_noise_too():
    x0, x_t = two_images()
    x0[1, 0, 2, 3] = torch.nan
    steps = Ddim(linear(50))
    with pytest.raises(NonFiniteError, match=r"step 7, in images \[1\]"):
        FiniteCheck(lambda x, t: steps.step(x0, x, t))(x_t, 7)


@pytest.mark.parametrize(
    "betas",
    [beta_schedule("linear", 1000), beta_schedule("cosine", 1000), beta_schedule("linear", 25)],
)
def test_the_largest_eta_is_where_the_noise_takes_all_room(betas):
    diffusion = GaussianDiffusion(betas)
    abar, largest = np.cumprod(1 - betas), diffusion.largest_ddim_eta
    prev = abar[:-1]
    sigma = largest * np.sqrt((1 - prev) / (1 - abar[1:]) * (1 - abar[1:] / prev))
    assert largest >= 1
    assert (sigma**2 / (1 - prev)).max() == pytest.approx(1)
    p = Ddim(diffusion, largest).step(*two_images(), 1)
    assert p.mean.isfinite().all()
    for eta in (largest * 1.001, -0.1, math.nan):
        with pytest.raises(ValueError, match="eta is"):
            Ddim(diffusion, eta)


def test_a_single_step_has_no_noise_whatever_eta():
    x0, x_t = two_images()
    p = Ddim(GaussianDiffusion([0.3]), 1e300).step(x0, x_t, 0)
    assert torch.equal(p.mean, x0) and p.sigma.item() == 0


# ---- Gaussian data ---------------------------------------------------------------------------


def free_scaling(respacing: str, std: float = 0.5) -> float:
    """x_0 / x_T as the loop draws it with η = 0, for data N(0, std²) and their ideal network."""
    process = respaced_process(beta_schedule("linear", 1000), respacing)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = ABAR[int(t[0])]
        return x * math.sqrt(1 - abar) / (abar * std**2 + 1 - abar)

    denoise = ddim(network_denoiser(network, process, clip_denoised=False), process)
    blank, times = torch.zeros(1, 3, 8, 8), plain_times(process.diffusion.num_timesteps)
    x = repaint(
        lambda x, t: denoise(x, t, torch.zeros(1)),
        *(process.diffusion, times, Streams([3]).normal(blank), Streams([4])),
    )
    ratio = x / Streams([3]).normal(blank)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    return ratio.mean().item()


def test_without_eta_the_loop_is_the_closed_map_of_gaussian_data():
    """x_t is scaled by √ᾱ' √ᾱ s²/v + √(1 − ᾱ') √(1 − ᾱ)/v, with v = ᾱ s² + 1 − ᾱ its variance."""
    expected, kept = 1.0, np.append(1.0, ABAR[::50])
    for prev, abar in pairwise(kept):
        v = abar / 4 + 1 - abar
        expected *= (math.sqrt(prev * abar) / 4 + math.sqrt((1 - prev) * (1 - abar))) / v
    assert free_scaling("ddim20") == pytest.approx(expected, rel=1e-4)


def test_without_eta_more_steps_approach_the_flow_of_probability():
    """It keeps quantiles: x_0 = x_T s / √v_T, where x_T is as far as the kept steps go."""

    def error(stride: int) -> float:
        abar = ABAR[::stride][-1]
        exact = 0.5 / math.sqrt(abar / 4 + 1 - abar)
        return abs(free_scaling(f"ddim{1000 // stride}") / exact - 1)

    coarse, middle, fine = error(100), error(20), error(4)
    assert coarse > 3.5 * middle > 12 * fine  # the error is about as the stride
    assert fine < 0.02


def test_resampling_approaches_the_conditional_distribution():
    """Numbers from the closed form of all moments; the table in docs/samplers.md has more."""
    once = inpainting_error(1, 1, steps=25, eta=0.0)
    resampled = inpainting_error(10, 1, steps=25, eta=0.0)
    longer = inpainting_error(10, 2, steps=50, eta=0.0)
    assert once.kl > 4 * resampled.kl > 8 * longer.kl
    assert once.mean > 2 * resampled.mean > 3 * longer.mean


def test_eta_1_has_the_ancestral_means_on_gaussian_data():
    """Both means are the posterior's, and means of affine steps do not feel variances."""
    ancestral, noisy = (inpainting_error(10, 1, steps=25, eta=eta) for eta in (None, 1.0))
    assert noisy.mean == pytest.approx(ancestral.mean, abs=1e-4)
    assert abs(noisy.cov - ancestral.cov) > 0.01


def test_the_table_in_the_documentation_is_what_its_command_prints():
    documented = (ROOT / "docs" / "samplers.md").read_text("utf-8")
    assert "python tests/exact_samplers.py" in documented
    for steps, r in ((25, 1), (100, 1), (25, 10), (50, 10)):
        assert exact_samplers.row(steps, r) in documented.splitlines()
    starts = [f"| {r} | {steps} | " for steps, r in exact_samplers.SETTINGS]
    assert [
        sum(line.startswith(start) for line in documented.splitlines()) for start in starts
    ] == [1] * len(starts)


# ---- The whole loop --------------------------------------------------------------------------


def prediction(x: np.ndarray, t: float, y: float) -> np.ndarray:
    """What the stand-in for a network puts out; depends on all that it is told, without sense."""
    return 1.5 * np.tanh(1.3 * x + y / 1000) * (1 - t / 2000) + 0.3 * np.sin(5 * x + t / 100)


CLASSES = np.random.default_rng(1).standard_normal((5, 3, SIDE, SIDE)) * 0.3


def log_likelihood_gradient(x: np.ndarray, t: float, y: int) -> np.ndarray:
    """Of softmax(W x · (1 + t / 1000)), the stand-in for a classifier, by hand."""
    factor = 1 + t / 1000
    logits = factor * (CLASSES * x).sum(axis=(1, 2, 3))
    p = np.exp(logits - logits.max())
    return factor * (CLASSES[y] - np.tensordot(p / p.sum(), CLASSES, 1))


def stand_in(*_: object, gradients: bool = False) -> object:
    """In place of `load_network`."""

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        each = zip(x.double().numpy(), t.tolist(), y.tolist(), strict=True)
        return torch.from_numpy(np.stack([prediction(*one) for one in each])).float()

    def classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("bchw,kchw->bk", x, torch.from_numpy(CLASSES).float())
        return logits * (1 + t[:, None] / 1000)

    return classifier if gradients else network


@pytest.fixture
def load(monkeypatch):
    """Inpainters of a config, with stand-ins for the networks."""
    monkeypatch.setattr(factory, "load_network", stand_in)
    monkeypatch.setattr(factory, "check_checkpoints", factory.build_networks)

    def load(*overrides: str) -> Inpainter:
        jumps = ", ".join(f"{name}: {value}" for name, value in JUMPS.items())
        keys = ("image_size=64", "data.eval.resample.image_size=64", "attention_resolutions=32")
        schedule = ("timestep_respacing=ddim10", f"schedule_jump_params={{{jumps}}}")
        kind = ("class_cond=true", "learn_sigma=false")
        return load_inpainter(str(CONF), "cpu", (*keys, *kind, *schedule, *overrides))

    return load


def slow_loop(
    gt: np.ndarray,
    m: np.ndarray,
    seed: int,
    eta: float,
    *,
    scale: float = 0.0,
    cond_y: int | None = None,
    predict_xstart: bool = False,
    clip: bool = True,
) -> np.ndarray:
    """RePaint with DDIM in float64, straight from the formulas; one image, (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 1000, (1,), generator=generator).item() if cond_y is None else cond_y
    abar = ABAR[::100]

    def normal() -> np.ndarray:
        return torch.randn(gt.shape, generator=generator).double().numpy()

    x = normal()
    for i, (t, u) in enumerate(pairwise(jump_times(ScheduleConfig(**JUMPS)))):
        n = normal()
        if u > t:
            alpha = abar[u] / abar[t]
            x = np.sqrt(alpha) * x + np.sqrt(1 - alpha) * n
            continue
        if i > 0:
            x = m * (np.sqrt(abar[t]) * gt + np.sqrt(1 - abar[t]) * normal()) + (1 - m) * x
        x0 = prediction(x, 100 * t, drawn)
        if not predict_xstart:
            x0 = (x - np.sqrt(1 - abar[t]) * x0) / np.sqrt(abar[t])
        if clip:
            x0 = np.clip(x0, -1, 1)
        eps = (x - np.sqrt(abar[t]) * x0) / np.sqrt(1 - abar[t])
        if scale:
            gradient = log_likelihood_gradient(x, 100 * t, drawn)
            eps = eps - np.sqrt(1 - abar[t]) * scale * gradient
            x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        prev = abar[t - 1] if t > 0 else 1.0
        sigma = eta * np.sqrt((1 - prev) / (1 - abar[t])) * np.sqrt(1 - abar[t] / prev)
        x = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps + sigma * n
    return x


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    return images, torch.rand(2, 1, SIDE, SIDE, generator=generator)  # masks of all shades


@pytest.mark.parametrize(
    ("eta", "keys", "options"),
    [
        (0.0, [], {}),
        (0.7, ["predict_xstart=true"], {"predict_xstart": True}),
        (1.0, ["clip_denoised=false"], {"clip": False}),
        (
            0.4,
            ["classifier_scale=2", "classifier_path=c.pt", "cond_y=3"],
            {"scale": 2.0, "cond_y": 3},
        ),
    ],
)
def test_the_loop_is_the_slow_one(load, eta, keys, options):
    gt, keep_mask = batch()
    result = load("use_ddim=true", f"ddim_eta={eta}", *keys)(gt, keep_mask, seed=7)
    for i in range(2):
        image, mask = gt[i].double().numpy(), keep_mask[i].double().numpy()
        expected = slow_loop(image, mask, 7 + i, eta, **options)
        error = np.abs(result[i].double().numpy() - expected).max()
        assert error < 2e-4 * np.abs(expected).max()


def test_eta_changes_results_and_not_the_streams(load):
    gt, keep_mask = batch()
    results, streams = [], []
    for keys in ([], ["use_ddim=true"], ["use_ddim=true", "ddim_eta=0.5"]):
        states = []
        x = load(*keys).sample(
            gt, keep_mask, [1, 2], after_evaluation=lambda now, s=states: s.append(now.state())
        )
        results.append(x)
        streams.append([state.streams for state in states])
    for other in streams[1:]:
        for ours, theirs in zip(streams[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.isclose(a, b).all() for a, b in pairwise([*results, results[0]]))


def test_from_any_state_it_goes_on_to_the_same_bits(load):
    inpaint, states = load("use_ddim=true", "ddim_eta=0.5"), []
    arguments = (*batch(), [1, 2])
    whole = inpaint.sample(*arguments, after_evaluation=lambda now: states.append(now.state()))
    assert len(states) == inpaint.evaluations
    for state in states[::5]:
        assert torch.equal(inpaint.sample(*arguments, resume=state), whole)


# ---- Settings --------------------------------------------------------------------------------


def test_an_eta_without_room_is_refused_before_anything_is_loaded():
    steps = ["timestep_respacing=ddim10", "schedule_jump_params=null", "use_ddim=true"]
    with pytest.raises(UserError, match=r"ddim_eta: found 2, .*; accepted: from 0 to 1$"):
        load_inpainter(str(CONF), "cpu", [*steps, "ddim_eta=2", "model_path=nowhere.pt"])


def test_an_eta_up_to_what_the_message_says_is_taken(load):
    with pytest.raises(UserError) as error:
        load("use_ddim=true", "ddim_eta=9")
    largest = str(error.value).rpartition(" ")[2]
    assert load("use_ddim=true", f"ddim_eta={largest}")(*batch()).isfinite().all()
