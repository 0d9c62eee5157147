import dataclasses
import itertools
import math

import pytest
import tiny
import torch
from mergekit.merge_methods import merge_tensors
from setups import TRAJECTORIES, VOCABULARY, make_setup, trajectory
from test_masking import logit_gradient, signsgd
from transformers import get_cosine_schedule_with_warmup

from somf_mergekit.common import chunks as pieces
from somf_mergekit.data.logprobs import (
    answer_sums,
    answer_token_log_probs,
    output_head,
    token_batch,
)
from somf_mergekit.fusion.merges import LinearMerge
from somf_mergekit.fusion.shards import Shard
from somf_mergekit.learner import engine, loop, optimizer, passes
from somf_mergekit.learner.parts import Content, Parts, State
from somf_mergekit.learner.stopping import LearningDiverged
from somf_mergekit.learner.tensors import FixedTensor
from somf_mergekit.mask import masking, noise
from somf_mergekit.recipe.settings import Settings


def token_log_probs(model, weights, prompt, answer):
    ids = torch.tensor([prompt + answer])
    logits = torch.func.functional_call(model, weights, (ids,)).logits
    logs = torch.log_softmax(logits.float(), dim=-1)[0, len(prompt) - 1 : -1]
    return logs.gather(1, torch.tensor(answer)[:, None])[:, 0]


def answer_sum(model, weights, prompt, answer):
    return token_log_probs(model, weights, prompt, answer).sum()


def plain_factor(tensor, mask, mean=None):
    """What a task vector is multiplied by: each factor of a mask over its own mean."""
    found, start = torch.ones(()), 0
    for layout in tensor.layout.factors or (tensor.layout,):
        count = math.prod(layout.shape)
        own = mask.flatten()[start : start + count]
        over = (own.mean() if mean is None else mean[start]) if tensor.rescale == "mean" else 1.0
        factor = (own / over).view(layout.shape)
        if layout.repeat > 1:
            parts = factor.split(1, dim=layout.axis)
            parts = [part for part in parts for _ in range(layout.repeat)]
            factor = torch.cat(parts, dim=layout.axis)
        found, start = found * factor, start + count
    return found


def own_means(tensor, mask):
    """The mean of an entry's factor of a mask, for each entry, fixed."""
    counts = [math.prod(layout.shape) for layout in tensor.layout.factors or (tensor.layout,)]
    parts = mask.detach().flatten().split(counts)
    return torch.cat([part.mean().expand(len(part)) for part in parts])


def plain_weight(tensor, masks, means=None):
    """The merged weight under masks, differentiable: the fusion of masked models."""
    base, merge = tensor.parts.base, tensor.parts.merge
    means = means or [None] * len(masks)
    factors = [plain_factor(tensor, m, n) for m, n in zip(masks, means, strict=True)]
    if isinstance(merge, LinearMerge):
        return base + sum(d * f for d, f in zip(merge.deltas, factors, strict=True))
    models = [e.tensor for e in merge.group.non_base]
    factors = factors * len(models) if len(factors) == 1 else factors
    masked = [base + (m - base) * f for m, f in zip(models, factors, strict=True)]
    own = {"weight": 0.5, "density": 0.6}
    return merge_tensors([base, *masked], "ties", parameters=own, base_index=0)


def plain_loss(settings, chosen, rejected, reference):
    """The loss of one pair, from log-probabilities of its answers' tokens."""
    likelihood = -chosen.mean()
    if settings.objective == "sft":
        return likelihood
    per_token = settings.objective in ("dpo_norm", "ipo")
    of = torch.mean if per_token else torch.sum
    ratio = (of(chosen) - of(rejected)) - (of(reference[0]) - of(reference[1]))
    margin = settings.beta * ratio
    if settings.objective == "ipo":
        loss = (ratio - 1 / (2 * settings.beta)) ** 2
    elif settings.objective == "hinge":
        loss = torch.clamp(1 - margin, min=0)
    else:
        loss = -torch.log(torch.sigmoid(margin))
    return loss + settings.sft_weight * likelihood


def reference_trajectory(setup):
    """The same learning, written plainly: autograd through the mask, one pair at a time."""
    settings, pairs = setup.settings, setup.pairs
    model = tiny.tiny_llama(0, VOCABULARY)
    weights_of = {t.name: t for t in setup.tensors}
    logits = {
        n: [torch.full(t.layout.shape, settings.init_logit).requires_grad_() for _ in t.models]
        for n, t in weights_of.items()
    }
    all_logits = [x for own in logits.values() for x in own]

    def merged(masks, means=None):
        return {n: plain_weight(weights_of[n], m, means and means[n]) for n, m in masks.items()}

    def soft(start):
        return {n: [torch.sigmoid(x) for x in own] for n, own in start.items()}

    def sampled(step, start, prefix=""):
        if settings.mask_noise == "none":
            return soft(start)
        masks = {}
        for name, own in start.items():
            key = noise.noise_key(seed=settings.seed, step=step, name=prefix + name)
            u = noise.uniform_noise(key, own[0].numel()).view(own[0].shape)
            drawn = torch.log(u / (1 - u))
            masks[name] = [torch.sigmoid((x + drawn) / settings.temperature) for x in own]
        return masks

    def answers(weights, pair):
        return [
            token_log_probs(model, weights, pair.prompt, a) for a in (pair.chosen, pair.rejected)
        ]

    untrained = {n: [x.detach().clone() for x in own] for n, own in logits.items()}
    with torch.no_grad():
        fixed = {n: t.parts.base for n, t in weights_of.items()}
        if settings.reference == "merged":
            fixed = merged(soft(untrained))
        ones = {n: [torch.ones_like(x) for x in own] for n, own in untrained.items()}
        unmasked = merged(ones)
        plain = [token_log_probs(model, unmasked, e.prompt, e.chosen) for e in setup.utility]
    losses, divergences, norms = [], [], []
    adamw = torch.optim.AdamW(all_logits, weight_decay=0.0)
    for step in range(settings.max_steps):
        if settings.reference == "redrawn":
            fixed = merged(sampled(step, untrained, "untrained/"))
        masks = sampled(step, logits)
        weights = merged(masks)
        terms = []
        for row in range(step * settings.batch_size, (step + 1) * settings.batch_size):
            pair = pairs[row % len(pairs)]
            with torch.no_grad():
                reference = answers(fixed, pair)
            terms.append(plain_loss(settings, *answers(weights, pair), reference))
        loss = torch.stack(terms).mean()
        losses.append(loss.item())
        if setup.utility:
            apart = []
            for row in range(step * settings.batch_size, (step + 1) * settings.batch_size):
                if row < len(plain):
                    example = setup.utility[row]
                    now = token_log_probs(model, weights, example.prompt, example.chosen)
                    apart.append(0.5 * (now - plain[row]) ** 2)
            divergence = torch.cat(apart).mean()
            divergences.append(divergence.item())
            loss = loss + settings.utility_weight * divergence
        of_weights = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        # An entry's own gradient is what there is where the mean doesn't follow the mask.
        means = {n: [own_means(weights_of[n], m) for m in own] for n, own in masks.items()}
        fixed_mean = merged(masks, means)
        steps, warmup = settings.max_steps, max(1, round(settings.warmup * settings.max_steps))
        progress = (step - warmup + 1) / (steps - warmup + 1)
        rate = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        of_logits = [
            (name, x, of_weight)
            for (name, own), of_weight in zip(logits.items(), of_weights, strict=True)
            for x in own
        ]
        for name, x, of_weight in of_logits:
            both = [
                torch.autograd.grad(w[name], x, of_weight, retain_graph=True)[0].double()
                for w in (weights, fixed_mean)
            ]
            if settings.optimizer == "signsgd":
                factors = weights_of[name].layout.factors
                counts = [math.prod(layout.shape) for layout in factors] or [x.numel()]
                rate_now = settings.learning_rate * rate
                pieces_of = [t.flatten().split(counts) for t in (x.data, *both)]
                moved = [signsgd(*of, rate_now, 1e-5) for of in zip(*pieces_of, strict=True)]
                x.data = torch.cat(moved).view(x.shape).float()
            else:
                x.grad = both[0].float()
        if settings.optimizer == "adamw":
            norms.append(float(torch.nn.utils.clip_grad_norm_(all_logits, 1.0)))
            adamw.param_groups[0]["lr"] = settings.learning_rate * rate
            adamw.step()
    if norms:
        assert (max(norms) > 1) == (settings.beta > 1), norms
    return losses, divergences, [x.detach() for x in all_logits]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_whole_trajectory_is_that_of_plain_autograd(name):
    # The sign of a gradient that is rounding noise is almost a whole step: so all losses are
    # compared closely, but of the logits the few with such gradients may differ.
    changes = {"max_steps": 3} | TRAJECTORIES[name]
    expected_losses, expected_divergences, expected = reference_trajectory(make_setup(**changes))
    setup = make_setup(**changes)
    reports = []
    loop.learn_logits(setup, reports.append, lambda done, total: None)
    assert [r.loss for r in reports] == pytest.approx(expected_losses, rel=1e-5, abs=1e-5)
    if setup.utility:
        assert [r.utility for r in reports] == pytest.approx(expected_divergences, abs=1e-5)
        assert max(expected_divergences) > 1e-3
    found = [own for t in setup.tensors for _, own in t.wholes()]
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    moved = torch.cat([(a - changes.get("init_logit", 0)).flatten() for a in found])
    assert moved.abs().max() > 0.05
    # AdamW's first steps are of one size too, whatever the gradient's.
    least = 0.98 if changes.get("optimizer") == "adamw" else 0.99
    assert (difference.abs() < 2e-3).float().mean() > least
    assert difference.mean().abs() < 1e-4


def test_a_larger_utility_weight_keeps_the_merge_closer_to_the_unmasked_one():
    ends = []
    for weight in (0.0, 30.0):
        setup = make_setup(
            utility_dataset="y", utility_weight=weight, max_steps=30, epochs=30, batch_size=12
        )
        loop.learn_logits(setup, lambda report: None, lambda done, total: None)
        batch = token_batch([(e.prompt, e.chosen) for e in setup.utility])
        found = {
            content: next(setup.engine.evaluate([batch], State(content)))[0]
            for content in (Content.UNMASKED, Content.SOFT)
        }
        soft, unmasked = found[Content.SOFT], found[Content.UNMASKED]
        ends.append((soft - unmasked).square().mean().item())
    assert ends[1] < 0.5 * ends[0]


def test_weights_merged_without_a_mask_are_the_bases_only_while_it_is_the_reference(monkeypatch):
    setup = make_setup(max_steps=1, reference="base")
    first, *masked = setup.tensors
    base = first.parts.base
    other = base + 1.0
    parts = Parts(base, LinearMerge(other, (torch.zeros_like(other),)))
    fixed = FixedTensor(first.parameter, first.slice, first.shard, parts)
    seen = []
    real = engine.answer_token_log_probs

    def watching(*arguments):
        seen.append(torch.equal(first.weight, base))
        return real(*arguments)

    monkeypatch.setattr(engine, "answer_token_log_probs", watching)
    runs = engine.ResidentEngine(setup.engine._model, masked, [fixed], None)
    trajectory(dataclasses.replace(setup, tensors=masked, engine=runs))
    assert seen == [True, False]
    assert torch.equal(first.weight, other)


def test_how_a_batch_is_cut_up_changes_nothing():
    losses, logits = trajectory(make_setup(micro_batch=4))
    for micro_batch in (1, 2):
        other_losses, other = trajectory(make_setup(micro_batch=micro_batch))
        assert other_losses == pytest.approx(losses, abs=1e-5)
        difference = torch.cat([(a - b).flatten() for a, b in zip(logits, other, strict=True)])
        assert (difference.abs() < 1e-3).float().mean() > 0.995
        assert difference.mean().abs() < 1e-4


@pytest.mark.parametrize("name", ["defaults", "no rescale", "head", "column", "row"])
def test_the_pieces_that_a_tensor_is_worked_through_in_change_nothing(name, monkeypatch):
    whole = make_setup(**TRAJECTORIES[name], max_steps=2)
    losses, logits = trajectory(whole)
    assert max(t.weight.numel() for t in whole.tensors) > 200
    monkeypatch.setattr(pieces, "PIECE", 100)
    other_losses, other = trajectory(make_setup(**TRAJECTORIES[name], max_steps=2))
    assert other_losses == pytest.approx(losses, abs=1e-5)
    difference = torch.cat([(a - b).flatten() for a, b in zip(logits, other, strict=True)])
    assert (difference.abs() < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize("rescale", ["mean", "none"])
def test_gradients_are_those_of_the_formula_in_bfloat16_too(rescale):
    draw = torch.Generator().manual_seed(0)
    start, delta, gradient, logits = (torch.randn(70, 9, generator=draw) for _ in range(4))
    key = noise.noise_key(seed=0, step=0, name="w")
    sampler = masking.MaskSampler(logits.view(-1), 0.5, key)
    sample = sampler.whole().view(70, 9)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        merge = LinearMerge(start, (delta.to(dtype),))
        weight = torch.full((70, 9), torch.nan, dtype=dtype)
        shard = Shard((70, 9))
        merge.write_sampled(weight, [sampler], rescale, shard)
        expected = start + delta * masking.mask_factor(sample, rescale)
        torch.testing.assert_close(weight.float(), expected, rtol=tolerance, atol=tolerance)
        given = gradient.to(dtype, copy=True)
        found = optimizer.logit_gradient(
            optimizer.FactorGradient(given, *merge.deltas, sampler, rescale, shard, weight)
        )
        ((_, *both),) = found.parts()
        formulas = logit_gradient(gradient * delta, sample, 0.5, rescale)
        for one, expected in zip(both, formulas, strict=True):
            torch.testing.assert_close(
                one.view(70, 9), expected.float(), rtol=tolerance, atol=tolerance
            )


def test_a_second_run_is_equal_bit_for_bit_and_another_seed_is_not():
    first, second = trajectory(make_setup()), trajectory(make_setup())
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    other = trajectory(make_setup(seed=1))
    assert first[0] != other[0]


def test_learning_lowers_the_loss_of_its_pairs():
    losses, _ = trajectory(make_setup(max_steps=30, batch_size=12, epochs=30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_no_step_leaves_the_mask_untrained():
    losses, logits = trajectory(make_setup(max_steps=0, init_logit=0.7))
    assert losses == []
    assert all(torch.equal(x, torch.full_like(x, 0.7)) for x in logits)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    setup = make_setup()
    reports = []
    real = passes.preference_losses

    def broken(*arguments):
        losses, margins = real(*arguments)
        return (losses * float("nan") if len(reports) == 2 else losses), margins

    passes.preference_losses = broken
    try:
        with pytest.raises(LearningDiverged) as error:
            loop.learn_logits(setup, reports.append, lambda done, total: None)
    finally:
        passes.preference_losses = real
    assert (error.value.step, error.value.is_intact) == (2, True)
    good = make_setup(max_steps=4)
    steps = iter(range(4))
    with pytest.raises(StopIteration):
        loop.learn_logits(good, lambda r: stop_after(next(steps), 1), lambda done, total: None)
    for one, other in zip(setup.tensors, good.tensors, strict=True):
        assert torch.equal(one.whole(), other.whole())


def stop_after(step, last):
    if step == last:
        raise StopIteration


def test_steps_epochs_and_batches():
    settings = Settings(safety_dataset="x", batch_size=4, epochs=2, max_steps=None)
    assert loop.step_count(settings, 10) == 6
    assert loop.step_count(settings.model_copy(update={"max_steps": 5}), 10) == 5
    plan = loop.batches(10, settings, 6)
    assert [len(batch) for batch in plan] == [4, 4, 2, 4, 4, 2]
    assert plan[0] == [0, 1, 2, 3]
    assert sorted(list(itertools.chain(*plan[3:]))) == list(range(10))
    assert list(itertools.chain(*plan[3:])) != list(range(10))


def test_learning_rate_warms_up_and_falls_to_almost_nothing():
    rates = [0.1 * loop.learning_rate_multiplier(step, 60, 0.08) for step in range(60)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] < 0.001
    assert loop.learning_rate_multiplier(0, 1, 0.08) == 1
    # Without a warm-up, what transformers has for a cosine.
    rates = [loop.learning_rate_multiplier(step, 963, 0) for step in range(963)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = get_cosine_schedule_with_warmup(optimizer, 0, 963)
    for rate in rates:
        assert rate == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        cosine.step()


def test_learning_may_end_before_its_schedule():
    changes = {"learning_rate": 0.1, "warmup": 0.0, "max_steps": 2}
    reports = []
    setup = make_setup(**changes, schedule_steps=963)
    loop.learn_logits(setup, reports.append, lambda done, total: None)
    assert [r.multiplier for r in reports] == [1, loop.learning_rate_multiplier(1, 963, 0)]
    # One that is shorter than learning has no effect.
    short, plain = [], []
    for shares, more in ((short, {"schedule_steps": 1}), (plain, {})):
        setup = make_setup(**changes, **more)
        loop.learn_logits(setup, shares.append, lambda done, total: None)
    assert [r.multiplier for r in short] == [r.multiplier for r in plain] == [1, 0.5]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_answer_log_probs_are_those_of_the_models_own_logits(architecture, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    from somf_mergekit.data import logprobs

    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", 3)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
    )
    if architecture == "granite":
        config.logits_scaling = 3.0
    model = AutoModelForCausalLM.from_config(config).eval()
    sequences = [([5, 6, 7], [8, 9]), ([3], [4, 5, 6, 7, 8])]
    found = answer_token_log_probs(model, output_head(model), token_batch(sequences))
    sums, lengths = answer_sums(*found, len(sequences))
    assert lengths.tolist() == [2, 5]
    expected = [answer_sum(model, dict(model.named_parameters()), *s).item() for s in sequences]
    assert sums.tolist() == pytest.approx(expected, abs=1e-3)


def test_a_model_with_unknown_treatment_of_its_logits_is_refused():
    class Odd(type(tiny.tiny_llama(0, VOCABULARY))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Odd(tiny.tiny_llama(0, VOCABULARY).config)
    with pytest.raises(ValueError, match="computes its logits in a way"):
        output_head(model)
