import math

import pytest
import torch

from somf_mergekit.common import chunks as pieces
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.learner import optimizer
from somf_mergekit.mask import masking, noise


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def key(**changes):
    return noise.noise_key(**({"seed": 0, "step": 0, "name": "w"} | changes))


def uniform(shape, **changes):
    return noise.uniform_noise(key(**changes), math.prod(shape)).view(shape)


def logit_gradient(factor_gradient, mask, temperature, rescale):
    """dL/dx and its own term by the formula, from dL/dc, in float64."""
    given, mask = factor_gradient.double(), mask.double()
    slope = mask * (1 - mask) / temperature
    if rescale == "none":
        return given * slope, given * slope
    own = given * slope / mask.mean()
    return own - (given * mask).mean() / mask.mean() ** 2 * slope, own


def concrete_sample(logits, key, temperature):
    sampler = masking.MaskSampler(logits.reshape(-1), temperature, key)
    return sampler.whole().view(logits.shape)


def gradient_of(of_factor, logits, rescale):
    """The gradient of the factor of a sample of these logits, at 0.5."""
    sampler, shape = masking.MaskSampler(logits.view(-1), 0.5, key()), logits.shape
    room = torch.empty(shape)
    return optimizer.FactorGradient(of_factor, None, sampler, rescale, Shard(shape), room)


def signsgd(logits, gradient, own, rate, eps):
    """A step by the formula."""
    size = torch.minimum(gradient.abs(), own.abs())
    length = size / (size + eps * own.abs().mean() + 1e-300)
    return logits - rate * gradient.sign() * length


@pytest.mark.parametrize("mask_shape", [(6, 5), (6, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("rescale", masking.RESCALES)
def test_logit_gradient_and_its_own_term_are_those_of_autograd(mask_shape, rescale):
    base, delta, gradient = draw(6, 5), draw(6, 5, seed=1), draw(6, 5, seed=2)
    logits = draw(*mask_shape, seed=3).requires_grad_()
    noise = uniform(mask_shape)

    sample = torch.sigmoid((logits + torch.log(noise) - torch.log(1 - noise)) / 0.5)
    expected = []
    for mean in (sample.mean(), sample.mean().detach()):
        weight = base + delta * sample / (mean if rescale == "mean" else 1.0)
        of_logits = torch.autograd.grad((weight * gradient).sum(), logits, retain_graph=True)
        expected.append(of_logits[0].flatten())

    of_factor = (gradient * delta).sum_to_size(mask_shape).contiguous()
    found = optimizer.logit_gradient(gradient_of(of_factor, logits.detach(), rescale))
    ((_, *both),) = found.parts()
    for one, other in zip(both, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found.size == pytest.approx(expected[1].abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e-12])
@pytest.mark.parametrize("mask_shape", [(64, 32), (64, 1)])
@pytest.mark.parametrize("rescale", masking.RESCALES)
def test_a_step_is_the_rate_but_for_entries_without_a_gradient_of_their_own(
    rescale, mask_shape, size
):
    of_factor = size * draw(*mask_shape)
    of_factor[::2] = 0
    logits = draw(*mask_shape, seed=3)
    stepped = logits.clone()
    given = gradient_of(of_factor.clone(), stepped, rescale)
    optimizer.signsgd_step(stepped.view(-1), optimizer.logit_gradient(given), 0.1)
    moved = stepped - logits
    assert torch.equal(moved[::2], torch.zeros_like(moved[::2]))
    assert moved[1::2].abs().mean() == pytest.approx(0.1, rel=0.02)
    sample = concrete_sample(logits, key(), 0.5)
    expected = signsgd(logits, *logit_gradient(of_factor, sample, 0.5, rescale), 0.1, optimizer.EPS)
    torch.testing.assert_close(moved, (expected - logits).float(), rtol=0, atol=1e-3)


def test_a_step_of_a_tensor_without_any_gradient_is_none():
    logits = draw(5)
    stepped = logits.clone()
    found = optimizer.logit_gradient(gradient_of(torch.zeros(5), stepped, "mean"))
    assert float(optimizer.signsgd_step(stepped, found, 0.1)) == 0
    assert torch.equal(stepped, logits)


def test_concrete_sample_follows_its_formula_in_pieces_too(monkeypatch):
    logits, u = draw(7, 3), uniform((7, 3))
    expected = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / 0.7)
    torch.testing.assert_close(concrete_sample(logits, key(), 0.7), expected)
    monkeypatch.setattr(pieces, "PIECE", 6)
    torch.testing.assert_close(concrete_sample(logits, key(), 0.7), expected)
    torch.testing.assert_close(
        concrete_sample(logits.T, key(), 0.7),
        torch.sigmoid((logits.T + torch.logit(u.view(3, 7))) / 0.7),
    )


def test_concrete_samples_are_above_one_half_as_often_as_the_probability_says():
    logits = torch.full((200_000,), 0.8)
    sample = concrete_sample(logits, key(), 0.5)
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
    ours = concrete_sample(logits.detach(), key(), temperature)
    gradient = ours * (1 - ours) / temperature
    # 1 % of equal distributions are further apart than this.
    limit = 1.63 * (2 / count) ** 0.5
    assert kolmogorov_smirnov(ours, theirs.detach()) < limit
    assert kolmogorov_smirnov(gradient, their_gradient) < limit
    other = concrete_sample(logits.detach() + 0.1, key(), temperature)
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
    torch.testing.assert_close(sampled, concrete_sample(torch.logit(probability), own, 0.5))
    with pytest.raises(ValueError, match="hard"):
        masking.mask_from_probabilities(probability, "hard", **options)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_bernoulli_mask_is_a_concrete_draw_above_one_half_at_any_temperature(share):
    probability = torch.full((100_000,), share)
    options = {"seed": 3, "name": "w"}
    found = [
        masking.mask_from_probabilities(probability, kind, temperature=temperature, **options)
        for kind, temperature in (("bernoulli", 0.5), ("bernoulli", 10), ("sampled", 0.5))
    ]
    assert found[0].unique().tolist() == [0, 1]
    assert found[0].mean().item() == pytest.approx(share, abs=0.005)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], (found[2] > 0.5).float())
    other = masking.mask_from_probabilities(
        probability, "bernoulli", temperature=0.5, seed=4, name="w"
    )
    assert not torch.equal(found[0], other)
    # A draw of nothing keeps nothing.
    nothing = masking.mask_from_probabilities(
        torch.zeros(100), "bernoulli", temperature=0.5, **options
    )
    assert torch.equal(masking.mask_factor(nothing, "mean"), torch.zeros(100))


def test_sampling_at_the_ends_stays_finite():
    sample = masking.mask_from_probabilities(
        torch.tensor([0.0, 1.0]), "sampled", temperature=0.5, seed=0, name="w"
    )
    assert sample.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_rescaled_mask_averages_one_and_an_empty_mask_keeps_nothing():
    delta, mask = draw(4, 4), torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(masking.mask_factor(mask, "mean"), mask / mask.mean())
    assert torch.equal(masking.mask_factor(mask, "none"), mask)
    empty = delta * masking.mask_factor(torch.zeros(4, 4), "mean")
    assert torch.equal(empty, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="median"):
        masking.mask_scale(torch.tensor(0.5), "median")


def test_reductions_of_low_precision_masks_are_done_in_float32():
    mask = torch.full((70_000,), 0.3, dtype=torch.bfloat16)
    factor = masking.mask_factor(mask, "mean").float()
    assert factor.mean().item() == pytest.approx(1, rel=1e-2)
