import copy
import itertools
import math

import pytest
import tiny
import torch

from somf_mergekit import masking
from somf_mergekit.granularity import Storage, mask_layout
from somf_mergekit.learner import loop, passes
from somf_mergekit.learner.logprobs import answer_log_probs, output_head, token_batch
from somf_mergekit.learner.tensors import MaskedTensor
from somf_mergekit.preferences import EncodedPair
from somf_mergekit.recipe import Settings
from somf_mergekit.weights import LinearWeight

VOCABULARY = 64


def make_pairs(count=12, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()

    return [EncodedPair(tokens(3, 9), tokens(2, 7), tokens(2, 7)) for _ in range(count)]


def make_problem(micro_batch=4, **parameters):
    """A tiny Llama, two random task vectors at weight 0.5, and random pairs."""
    values = {"safety_dataset": "x", "max_steps": 4, "batch_size": 4} | parameters
    settings = Settings(**values)
    base = tiny.tiny_llama(0, VOCABULARY)
    others = [tiny.perturbed(base, seed) for seed in (1, 2)]
    model = copy.deepcopy(base).eval().requires_grad_(False)
    tensors = []
    for name, weight in model.named_parameters():
        start = base.get_parameter(name).detach()
        fused = sum(0.5 * (other.get_parameter(name).detach() - start) for other in others)
        tensors.append(
            MaskedTensor(
                name=name,
                weight=weight,
                base=start.clone(),
                merged=LinearWeight(start.clone(), fused),
                layout=mask_layout(settings.granularity, name, tuple(weight.shape), Storage(8)),
                temperature=settings.temperature,
                rescale=settings.mask_rescale,
                seed=settings.seed,
                init_logit=settings.init_logit,
                learning_rate=settings.learning_rate,
            )
        )
    return passes.LearningProblem(model, tensors, [], make_pairs(), [], settings, None, micro_batch)


def trajectory(problem):
    reports = []
    loop.learn_logits(problem, reports.append, lambda done, total: None)
    return [r.loss for r in reports], [t.logits.clone() for t in problem.tensors]


def answer_sum(model, weights, prompt, answer):
    ids = torch.tensor([prompt + answer])
    logits = torch.func.functional_call(model, weights, (ids,)).logits
    logs = torch.log_softmax(logits.float(), dim=-1)[0, len(prompt) - 1 : -1]
    return logs.gather(1, torch.tensor(answer)[:, None]).sum()


def reference_trajectory(problem):
    """The same learning, written plainly: autograd through the mask, one pair at a time."""
    settings, model, pairs = problem.settings, copy.deepcopy(problem.model), problem.pairs
    base = {t.name: t.base for t in problem.tensors}
    fused = {t.name: t.merged.fused for t in problem.tensors}
    logits = {n: torch.full_like(b, settings.init_logit).requires_grad_() for n, b in base.items()}
    adam = torch.optim.Adam(logits.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8)

    def merged(masks):
        def scale(m):
            return m.mean() if settings.mask_rescale == "mean" else 1.0

        return {n: base[n] + fused[n] * m / scale(m) for n, m in masks.items()}

    if settings.reference == "base":
        fixed = base
    else:
        fixed = merged({n: torch.sigmoid(x.detach()) for n, x in logits.items()})
    reference = [
        [answer_sum(model, fixed, p.prompt, a).item() for a in (p.chosen, p.rejected)]
        for p in pairs
    ]
    losses = []
    for step in range(settings.max_steps):
        masks = {}
        for name, x in logits.items():
            u = masking.uniform_noise(x.shape, seed=settings.seed, step=step, name=name)
            masks[name] = torch.sigmoid((x + torch.log(u / (1 - u))) / settings.temperature)
        weights = merged(masks)
        rows = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        terms = []
        for row in (r % len(pairs) for r in rows):
            pair = pairs[row]
            chosen = answer_sum(model, weights, pair.prompt, pair.chosen)
            rejected = answer_sum(model, weights, pair.prompt, pair.rejected)
            margin = (chosen - rejected) - (reference[row][0] - reference[row][1])
            terms.append(-torch.log(torch.sigmoid(settings.beta * margin)))
        loss = torch.stack(terms).mean()
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        steps, warmup = settings.max_steps, max(1, round(0.08 * settings.max_steps))
        progress = (step - warmup + 1) / (steps - warmup + 1)
        rate = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        adam.param_groups[0]["lr"] = settings.learning_rate * rate
        adam.step()
    return losses, [x.detach() for x in logits.values()]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 3},
        {"max_steps": 3, "mask_rescale": "none", "temperature": 0.8, "init_logit": 1.0},
        {"max_steps": 3, "reference": "merged", "mask_rescale": "none", "beta": 0.5},
    ],
    ids=["defaults", "no rescale", "reference merged"],
)
def test_whole_trajectory_is_that_of_plain_autograd(changes):
    # Adam turns the sign of a gradient that is rounding noise into almost a whole step: so all
    # losses are compared closely, but of the logits the few with such gradients may differ.
    expected_losses, expected = reference_trajectory(make_problem(**changes))
    losses, found = trajectory(make_problem(**changes))
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    assert (difference.abs() < 1e-3).float().mean() > 0.995
    assert difference.mean().abs() < 1e-4


def test_how_a_batch_is_cut_up_changes_nothing():
    losses, logits = trajectory(make_problem(micro_batch=4))
    for micro_batch in (1, 2):
        other_losses, other = trajectory(make_problem(micro_batch=micro_batch))
        assert other_losses == pytest.approx(losses, abs=1e-5)
        difference = torch.cat([(a - b).flatten() for a, b in zip(logits, other, strict=True)])
        assert (difference.abs() < 1e-3).float().mean() > 0.995
        assert difference.mean().abs() < 1e-4


def test_a_second_run_is_equal_bit_for_bit_and_another_seed_is_not():
    first, second = trajectory(make_problem()), trajectory(make_problem())
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    other = trajectory(make_problem(seed=1))
    assert first[0] != other[0]


def test_learning_lowers_the_loss_of_its_pairs():
    losses, _ = trajectory(make_problem(max_steps=30, batch_size=12, epochs=30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_no_step_leaves_the_mask_untrained():
    losses, logits = trajectory(make_problem(max_steps=0, init_logit=0.7))
    assert losses == []
    assert all(torch.equal(x, torch.full_like(x, 0.7)) for x in logits)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    problem = make_problem()
    reports = []
    real = passes.preference_losses

    def broken(*arguments):
        losses, margins = real(*arguments)
        return (losses * float("nan") if len(reports) == 2 else losses), margins

    passes.preference_losses = broken
    try:
        with pytest.raises(passes.LossNotFinite) as error:
            loop.learn_logits(problem, reports.append, lambda done, total: None)
    finally:
        passes.preference_losses = real
    assert error.value.step == 2
    good = make_problem(max_steps=4)
    steps = iter(range(4))
    with pytest.raises(StopIteration):
        loop.learn_logits(good, lambda r: stop_after(next(steps), 1), lambda done, total: None)
    for one, other in zip(problem.tensors, good.tensors, strict=True):
        assert torch.equal(one.logits, other.logits)


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
    rates = [0.1 * loop.rate_share(step, 60) for step in range(60)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] < 0.001
    assert loop.rate_share(0, 1) == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_answer_log_probs_are_those_of_the_models_own_logits(architecture, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    from somf_mergekit.learner import logprobs

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
    sums, lengths = answer_log_probs(model, output_head(model), token_batch(sequences))
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
