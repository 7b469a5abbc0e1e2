"""The training objective against independent truth, and the choice of timesteps by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep, beta_schedule
from guided_diffusion.training.losses import (
    LossSecondMomentTimesteps,
    UniformTimesteps,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    training_losses,
    variational_bound,
)

BYTES = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def diffusion(steps: int = 8) -> GaussianDiffusion:
    return GaussianDiffusion(beta_schedule("cosine", steps))


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x0, whose values are bytes, and noise; each (size, 3, 4, 4)."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (size, 3, 4, 4), generator=generator)
    return levels / 127.5 - 1, torch.randn(size, 3, 4, 4, generator=generator)


def random_output(size: int, channels: int = 6) -> torch.Tensor:
    """What a network might say, as a leaf of the gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, channels, 4, 4, generator=generator).requires_grad_()


def losses_of(output: torch.Tensor, t: torch.Tensor, steps: int = 8, **options) -> dict:
    x0, noise = batch(len(t))
    return training_losses(lambda x_t, t: output, diffusion(steps), x0, t, noise, **options)


# ---- The two distributions ----


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    mean1, mean2, log_variance1, log_variance2 = torch.randn(4, 1000, dtype=torch.float64)
    expected = kl_divergence(
        Normal(mean1, (log_variance1 / 2).exp()), Normal(mean2, (log_variance2 / 2).exp())
    )
    torch.testing.assert_close(gaussian_kl(mean1, log_variance1, mean2, log_variance2), expected)


@pytest.mark.parametrize("log_sigma", [-6.0, -3.0, -1.0, 0.5])
@pytest.mark.parametrize("mean", [-1.3, -0.3, 0.0, 0.9])
def test_probabilities_of_bytes(mean, log_sigma):
    mean, log_sigma = torch.full_like(BYTES, mean), torch.full_like(BYTES, log_sigma)
    probabilities = discretized_gaussian_log_likelihood(BYTES, mean, log_sigma).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)

    edges = (BYTES[1:] + BYTES[:-1]) / 2
    cdf = Normal(mean[0], log_sigma[0].exp()).cdf(edges)
    expected = torch.diff(cdf, prepend=torch.zeros(1), append=torch.ones(1))
    torch.testing.assert_close(probabilities, expected, atol=1e-11, rtol=1e-6)


def test_far_tails_keep_their_logarithm():
    """Where the probability itself is 0 in float32, the outermost bytes still teach."""
    log_p = discretized_gaussian_log_likelihood(
        torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(-4.0)
    )
    z = (-1 + 1 / 255 - 1) / math.exp(-4)
    assert log_p.item() == pytest.approx(-z * z / 2 - math.log(-z * math.sqrt(2 * math.pi)), 1e-4)


def test_the_bound_is_likelihood_at_step_0_and_kl_elsewhere():
    x0, noise = batch(2)
    t = torch.tensor([0, 5])
    process = diffusion()
    x_t = process.q_sample(x0, t, noise)
    p = ReverseStep(x0 + 0.1 * noise, torch.full_like(x0, -3.0), x0)
    likelihood, kl = variational_bound(process, p, x0, x_t, t) * math.log(2)

    ours = Normal(p.mean.double(), p.sigma.double())
    nearly_one = x0.double() > 0.999
    above = torch.where(nearly_one, 1.0, ours.cdf(x0.double() + 1 / 255))
    below = torch.where(x0 < -0.999, 0.0, ours.cdf(x0.double() - 1 / 255))
    expected = -(above - below).log()[0].mean()
    assert likelihood.item() == pytest.approx(expected.item(), rel=1e-3)

    beta, abar, before = (
        table[5] for table in (process.betas, process.alphas_cumprod, process.alphas_cumprod_prev)
    )
    mean = (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x_t) / (1 - abar)
    truth = Normal(mean.double(), (beta * (1 - before) / (1 - abar)) ** 0.5)
    assert kl.item() == pytest.approx(kl_divergence(truth, ours)[1].mean().item(), rel=1e-4)


# ---- The objective ----


@pytest.mark.parametrize("steps", [8, 1000])
def test_hybrid_loss_adds_the_bound_times_steps_per_thousand(steps):
    losses = losses_of(random_output(3), torch.tensor([0, 3, 7]), steps)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vlb"] * steps / 1000)


def test_bound_trains_the_variance_alone():
    output = random_output(3)
    losses_of(output, torch.tensor([0, 3, 7]))["vlb"].sum().backward()
    assert (output.grad[:, :3] == 0).all()
    assert (output.grad[:, 3:] != 0).flatten(1).any(dim=1).all()


def test_mse_trains_the_prediction_alone():
    output = random_output(3)
    losses_of(output, torch.tensor([0, 3, 7]))["mse"].sum().backward()
    assert (output.grad[:, :3] != 0).all()
    assert (output.grad[:, 3:] == 0).all()


def test_without_learned_variance_the_loss_is_the_mean_square():
    output = random_output(2, channels=3)
    losses = losses_of(output, torch.tensor([0, 6]))
    assert set(losses) == {"mse", "loss"}
    expected = torch.nn.functional.mse_loss(output, batch(2)[1], reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("channels", [3, 6])
def test_use_kl_is_the_whole_bound_and_trains_the_prediction(channels):
    output = random_output(2, channels)
    losses = losses_of(output, torch.tensor([0, 6]), use_kl=True)
    torch.testing.assert_close(losses["loss"], losses["vlb"] * 8)
    losses["loss"].sum().backward()
    assert (output.grad[:, :3] != 0).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_perfect_network(predict_xstart):
    """Its error is 0, and with the posterior's variance (v = −1) so is the bound for t > 0."""
    x0, noise = batch(8)
    target = x0 if predict_xstart else noise
    output = torch.cat([target, torch.full_like(target, -1.0)], dim=1)
    losses = losses_of(output, torch.arange(8), predict_xstart=predict_xstart)
    assert (losses["mse"] == 0).all()
    torch.testing.assert_close(losses["vlb"][1:], torch.zeros(7), atol=1e-5, rtol=0)
    assert losses["vlb"][0] > 0.1  # bytes are uncertain even then


@pytest.mark.parametrize("use_kl", [False, True])
def test_gradients_of_absurd_predictions_are_finite(use_kl):
    output = random_output(8).detach()
    output[:, :3] *= 10_000
    output.requires_grad_()
    losses_of(output, torch.arange(8), use_kl=use_kl)["loss"].sum().backward()
    assert output.grad.isfinite().all()


# ---- The choice of timesteps ----


def test_uniform_timesteps():
    torch.manual_seed(0)
    t, weights = UniformTimesteps(5).sample(5000)
    counts = torch.bincount(t, minlength=5)
    assert len(counts) == 5
    assert ((counts - 1000).abs() < 5 * 800**0.5).all()  # five standard deviations
    assert (weights == 1).all()


def history(*losses_of_steps: list[float]) -> LossSecondMomentTimesteps:
    timesteps = LossSecondMomentTimesteps(len(losses_of_steps))
    for step, losses in enumerate(losses_of_steps):
        timesteps.update(torch.full((len(losses),), step), torch.tensor(losses))
    return timesteps


def test_uniform_until_every_step_has_ten_losses():
    timesteps = history([1.0] * 30, [3.0] * 10, [5.0] * 9)
    assert timesteps.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    timesteps.update(torch.tensor([2]), torch.tensor([5.0]))
    assert timesteps.probabilities()[2] > 0.5


def test_probabilities_follow_the_root_of_the_mean_square():
    timesteps = history([1.0] * 10, [3.0] * 10, [0.0, 2.0] * 5, [0.0] * 10)
    total = 1 + 3 + 2**0.5 + 0
    expected = [0.999 * root / total + 0.001 / 4 for root in (1, 3, 2**0.5, 0)]
    assert timesteps.probabilities().tolist() == pytest.approx(expected)


def test_the_last_ten_losses_count():
    timesteps = history([7.0] * 4 + [1.0] * 10, [3.0] * 10)
    assert timesteps.probabilities()[0].item() == pytest.approx(0.999 / 4 + 0.0005)


def test_weights_keep_the_expected_loss():
    timesteps = history([1.0] * 10, [3.0] * 10, [0.5] * 10)
    torch.manual_seed(0)
    t, weights = timesteps.sample(4000)
    p = timesteps.probabilities()
    deviation = (torch.bincount(t, minlength=3) - 4000 * p).abs()
    assert (deviation < 5 * (4000 * p * (1 - p)).sqrt()).all()

    weight_of = dict(zip(t.tolist(), weights.tolist(), strict=True))
    losses = [0.3, 2.0, 11.0]  # any
    expected = sum(p[step].item() * weight_of[step] * losses[step] for step in range(3))
    assert expected == pytest.approx(sum(losses) / 3)


def test_state_goes_on_where_it_was():
    old = history([1.0] * 13, [3.0] * 11)
    new = LossSecondMomentTimesteps(2)
    new.load_state_dict(old.state_dict())
    for timesteps in (old, new):
        timesteps.update(torch.tensor([0, 1, 0]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(old.losses, new.losses)
    assert torch.equal(old.probabilities(), new.probabilities())


def test_state_of_another_process_is_refused():
    with pytest.raises(RuntimeError):
        LossSecondMomentTimesteps(3).load_state_dict(history([1.0], [2.0]).state_dict())
