import math

import pytest
import torch

from somf_mergekit import masking, noise, pieces


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def key(**changes):
    return noise.noise_key(**({"seed": 0, "step": 0, "name": "w"} | changes))


def uniform(shape, **changes):
    return noise.uniform_noise(key(**changes), math.prod(shape)).view(shape)


@pytest.mark.parametrize("mask_shape", [(6, 5), (6, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("rescale", masking.RESCALES)
def test_logit_gradient_is_that_of_autograd(mask_shape, rescale):
    base, delta, gradient = draw(6, 5), draw(6, 5, seed=1), draw(6, 5, seed=2)
    logits = draw(*mask_shape, seed=3).requires_grad_()
    noise = uniform(mask_shape)

    sample = torch.sigmoid((logits + torch.log(noise) - torch.log(1 - noise)) / 0.5)
    scale = sample.mean() if rescale == "mean" else 1.0
    weight = base + delta * sample / scale
    (expected,) = torch.autograd.grad((weight * gradient).sum(), logits)

    found = masking.logit_gradient(
        (gradient * delta).sum_to_size(mask_shape), sample.detach(), 0.5, rescale
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_concrete_sample_follows_its_formula_in_pieces_too(monkeypatch):
    logits, u = draw(7, 3), uniform((7, 3))
    expected = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / 0.7)
    torch.testing.assert_close(masking.concrete_sample(logits, key(), 0.7), expected)
    monkeypatch.setattr(pieces, "PIECE", 6)
    torch.testing.assert_close(masking.concrete_sample(logits, key(), 0.7), expected)
    torch.testing.assert_close(
        masking.concrete_sample(logits.T, key(), 0.7),
        torch.sigmoid((logits.T + torch.logit(u.view(3, 7))) / 0.7),
    )


def test_concrete_samples_are_above_one_half_as_often_as_the_probability_says():
    logits = torch.full((200_000,), 0.8)
    sample = masking.concrete_sample(logits, key(), 0.5)
    assert (sample > 0.5).float().mean().item() == pytest.approx(
        torch.sigmoid(torch.tensor(0.8)).item(), abs=0.005
    )


def kolmogorov_smirnov(one, two):
    """The largest distance between two samples' empirical distribution functions."""
    places = torch.cat([one, two]).sort().values
    below = [torch.searchsorted(part.sort().values, places, right=True) for part in (one, two)]
    return (below[0] / len(one) - below[1] / len(two)).abs().max().item()


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_concrete_samples_and_their_gradients_have_torchs_distribution(logit, temperature):
    count = 50_000
    logits = torch.full((count,), logit, requires_grad=True)
    torch.manual_seed(0)
    theirs = torch.distributions.RelaxedBernoulli(temperature, logits=logits).rsample()
    (their_gradient,) = torch.autograd.grad(theirs.sum(), logits)
    ours = masking.concrete_sample(logits.detach(), key(), temperature)
    gradient = masking.logit_gradient(torch.ones(count), ours, temperature, "none")
    # 1 % of equal distributions are further apart than this.
    limit = 1.63 * (2 / count) ** 0.5
    assert kolmogorov_smirnov(ours, theirs.detach()) < limit
    assert kolmogorov_smirnov(gradient, their_gradient) < limit
    other = masking.concrete_sample(logits.detach() + 0.1, key(), temperature)
    assert kolmogorov_smirnov(other, theirs.detach()) > limit


def test_mask_kinds():
    probability = torch.tensor([0.1, 0.5, 0.50001, 0.9])
    options = {"temperature": 0.5, "seed": 3, "name": "w"}
    soft = masking.mask_from_probabilities(probability, "soft", **options)
    binary = masking.mask_from_probabilities(probability, "binary", **options)
    sampled = masking.mask_from_probabilities(probability, "sampled", **options)
    assert torch.equal(soft, probability)
    assert binary.tolist() == [0, 0, 1, 1]
    own = key(seed=3, step=masking.MERGE_STEP)
    torch.testing.assert_close(sampled, masking.concrete_sample(torch.logit(probability), own, 0.5))
    with pytest.raises(ValueError, match="hard"):
        masking.mask_from_probabilities(probability, "hard", **options)


def test_sampling_at_the_ends_stays_finite():
    sample = masking.mask_from_probabilities(
        torch.tensor([0.0, 1.0]), "sampled", temperature=0.5, seed=0, name="w"
    )
    assert sample.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_rescaled_mask_averages_one_and_an_empty_mask_keeps_nothing():
    delta, mask = draw(4, 4), torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        masking.masked_task_vector(delta, masking.mask_factor(mask, "mean")),
        delta * mask / mask.mean(),
    )
    torch.testing.assert_close(
        masking.masked_task_vector(delta, masking.mask_factor(mask, "none")), delta * mask
    )
    empty = delta * masking.mask_factor(torch.zeros(4, 4), "mean")
    assert torch.equal(empty, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="median"):
        masking.mask_scale(torch.tensor(0.5), "median")


def test_reductions_of_low_precision_masks_are_done_in_float32():
    mask = torch.full((70_000,), 0.3, dtype=torch.bfloat16)
    assert masking.mask_mean(mask).item() == pytest.approx(mask[0].item(), rel=1e-5)
