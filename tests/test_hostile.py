"""Whatever recipes, data, artifacts and tensors hold: a right result or our one-line error."""

import copy
import json
import math
import os
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts

from somf_mergekit import MaskSet, RecipeError, register
from somf_mergekit.data.dataset_reading import dataset_rows
from somf_mergekit.data.encoding import encoded_pairs
from somf_mergekit.data.pairs import (
    answered_prompts,
    pairs_of_answers,
    preference_pairs,
    prompts_alone,
)
from somf_mergekit.fusion.groups import are_equal, is_finite
from somf_mergekit.mask.artifact_files import MASKS_FILE
from somf_mergekit.mask.granularity import Layout
from somf_mergekit.mask.writing import write_masks, write_packed_masks

# A test's folder is used again by each of its examples.
anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

ODD_NAMES = ["{}", "{0}", "%s", "%(x)s", "$(touch x)", "; touch x", "../x", "{{ 1 / 0 }}", "a@b@c"]
ODD_SIGNS = ["", " ", "\n", "a\x00b", "~", "é", "\u202e", "\ud800", "*", "[", "a,b", "nan", "1e400"]
ODD_TEXT = st.sampled_from([*ODD_NAMES, *ODD_SIGNS, "true"]) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([0, 1, -1, 2, 0.5, 10**400])
    | st.floats()
    | ODD_TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3),
    max_leaves=5,
)
# What may well be right in another place.
PLAUSIBLE = st.sampled_from([0, 1, 2, 3, 0.25, 0.5, 0.9, True]) | (
    st.sampled_from(["row", "head", "binary", "none", "mlp", "norm,attn", "*", "base", "float16"])
    # Made anew each time: what is drawn is changed further.
    | st.lists(st.sampled_from([0.1, 0.2, 1, 2]), min_size=2, max_size=3)
)
FUSIONS = ["task_arithmetic", "linear", "ties", "dare_linear", "nuslerp", "karcher"]


def places(value, path=()):
    """Every place in a nested value, as a path of keys."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number in range(len(value)):
            yield from places(value[number], (*path, number))


@st.composite
def mutated(draw, value):
    """A value with some of its places changed, taken out, doubled, or with more in them."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        *path, last = draw(st.sampled_from([p for p in places(value) if p]))
        parent = value
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["like", "like", "replace", "remove", "add", "rename", "wrap"]))
        if kind == "replace":
            parent[last] = draw(VALUES)
        elif kind == "like" and not isinstance(parent[last], (dict, list)):
            parent[last] = draw(PLAUSIBLE)
        elif kind == "wrap":
            parent[last] = draw(st.sampled_from([[parent[last]], [parent[last]] * 2]))
        elif kind == "remove":
            del parent[last]
        elif isinstance(parent, list):
            parent.append(draw(VALUES) if kind == "add" else parent[last])
        elif kind == "add":
            parent[draw(ODD_TEXT)] = draw(VALUES)
        else:
            parent[draw(ODD_TEXT)] = parent.pop(last)
        if len(list(places(value))) < 2:
            break
    return value


def ends_well(*command):
    """Whether a command of ours ended in success or one message."""
    result = tiny.invoke("mergekit-somf", *command)
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        command,
        result.exc_info,
    )
    assert result.exit_code in (0, 1)
    if result.exit_code:
        assert "Error: " in result.output
    return result.exit_code == 0


def recipe_of(family, **further):
    return tiny.recipe(
        family / "base",
        [family / "math", family / "code"],
        safety_dataset=str(family / "pairs.jsonl"),
        max_steps=2,
        learning_rate=[{"filter": "mlp", "value": 0.1}, {"value": [0.2, 0.1]}],
        granularity="weight",
        mask_kind="soft",
        temperature=0.5,
        seed=3,
        sft_weight=0.5,
        reference="base",
        include=["self_attn", "mlp*"],
        **further,
    )


@anew
@given(data=st.data())
def test_recipes_are_planned_or_refused(family, tmp_path, data):
    content = recipe_of(family, fusion=data.draw(st.sampled_from(FUSIONS)))
    content["tokenizer"] = data.draw(st.sampled_from([{"source": "base"}, {"source": "union"}]))
    content["out_dtype"] = "bfloat16"
    content = data.draw(mutated(content))
    try:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        assume(False)
    event("planned" if ends_well("check", tmp_path / "recipe.yml") else "refused")


@anew
@given(data=st.data())
def test_damaged_texts_of_recipes_are_read_or_refused(family, tmp_path, data):
    text = bytearray(yaml.safe_dump(recipe_of(family), sort_keys=False).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 8))
        odd = [b"", b"\x00", b"\xff", b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ", b"\t"]
        text[at : at + cut] = data.draw(st.sampled_from(odd) | st.binary(max_size=4))
    (tmp_path / "recipe.yml").write_bytes(text)
    ends_well("check", tmp_path / "recipe.yml")


@pytest.fixture(scope="module")
def tokenizers():
    return [tiny.tiny_tokenizer(), tiny.tiny_tokenizer(chat_template=None)]


def read_as_everything(path, tokenizers):
    """Read a file as each kind of data; return how many kinds it is."""
    read = 0
    for tokenizer in tokenizers:
        for reading in (as_pairs, as_answers, as_prompts):
            try:
                reading(dataset_rows(str(path)), str(path), tokenizer)
                read += 1
            except RecipeError as error:
                reported = error.message
                if str(path) not in reported and "chat template" not in reported:
                    raise
    return read


def as_pairs(rows, source, tokenizer):
    pairs = preference_pairs(rows, source)
    found, _ = encoded_pairs(pairs, tokenizer, 16, source)
    assert all(p.prompt and p.chosen and p.rejected and p.chosen != p.rejected for p in found)
    assert all(len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= 16 for p in found)


def as_answers(rows, source, tokenizer):
    examples = answered_prompts(rows, source)
    found, _ = encoded_pairs(pairs_of_answers(examples), tokenizer, 16, source)
    assert all(e.prompt and e.chosen for e in found)


def as_prompts(rows, source, tokenizer):
    assert prompts_alone(rows, source)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": ODD_TEXT},
        optional={"name": ODD_TEXT},
    ),
    max_size=3,
)
DIALOGUE = st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "\n\nAssistant: c"])
FIELD = SCALARS | MESSAGES | DIALOGUE | st.sampled_from(["how do i open a box", "sorry"])
# Far longer than any model reads, of one word and of many.
FIELD |= st.sampled_from(["x" * 100_000, "no cake " * 20_000])
COLUMNS = ["prompt", "chosen", "rejected", "response_0", "response_1", "is_response_0_safe"]
COLUMNS += [
    "is_response_1_safe",
    "question",
    "answer",
    "instruction",
    "output",
    "input",
    "messages",
]
COLUMNS += [
    "response",
    "is_safe",
    "goal",
    "behavior",
    "system",
    "context",
    "completion",
    "label",
    "",
]


@anew
@given(data=st.data())
def test_data_is_read_or_refused(tmp_path, tokenizers, data):
    columns = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=True))
    same = {name: data.draw(st.sampled_from([FIELD, MESSAGES, ODD_TEXT])) for name in columns}
    row = st.fixed_dictionaries({}, optional=same) | st.fixed_dictionaries(same)
    rows = data.draw(st.lists(row, max_size=4))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    read_as_everything(path, tokenizers)


@anew
@given(
    content=st.binary(max_size=60) | st.sampled_from([b"{}", b"[]", b"[1]", b'{"prompt": 1}\n[2]']),
    kind=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]),
)
def test_files_of_any_bytes_are_read_or_refused(tmp_path, tokenizers, content, kind):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(content)
    read_as_everything(path, tokenizers)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A learned and a packed artifact: folder, bytes of the masks, values by name."""
    root = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(3)
    names = {"layers.0.weight": (6, 4), "layers.1.weight": (2, 1), "norm": (5,), "scalar": ()}
    masks = write_masks(
        root / "soft",
        {name: torch.rand(shape) for name, shape in names.items()},
        aliases={"head": "layers.0.weight"},
        provenance={"seed": 1, "models": {"a": "0" * 64}},
        history=[{"step": 1}],
        layouts={"layers.1.weight": Layout((2, 1), 0, 3)},
    )
    found = []
    for opened in (masks, write_packed_masks(root / "packed", masks)):
        values = {name: opened.probabilities(name) for name in opened.names()}
        found.append((Path(opened.path).read_bytes(), values))
    return found


@anew
@given(data=st.data())
def test_damaged_artifacts_are_refused_or_say_the_same(tmp_path, artifacts, data):
    intact, values = data.draw(st.sampled_from(artifacts))
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        cut = data.draw(st.sampled_from([0, 1, 1, 1, 8, 1000]))
        damaged[at : at + cut] = data.draw(st.binary(min_size=cut and 1, max_size=max(1, cut)))
    (tmp_path / MASKS_FILE).write_bytes(damaged)
    try:
        masks = MaskSet.open(tmp_path)
        found = {name: masks.probabilities(name) for name in masks.names()}
    except RecipeError as error:
        if str(tmp_path) not in error.message:
            raise
        return
    assert set(found) == set(values)
    assert all(torch.equal(found[name], values[name]) for name in values)


DTYPES = ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["int8", "int64", "bool"]
SHAPES = [(), (0,), (1,), (0, 3), (3, 4), (1, 1), (2, 3, 2), (7,)]
PARTS = [0.0, -0.0, 1.0, -2.5, 1e-8, 6e4, -6e4, 3e38, math.nan, math.inf, -math.inf]


@st.composite
def tensors(draw, shape, dtype):
    count = math.prod(shape)
    simple = st.sampled_from([0.0, 0.5, 1.0, -1.5])
    parts = draw(st.sampled_from([simple, st.sampled_from(PARTS)]))
    values = draw(st.lists(parts, min_size=count, max_size=count))
    if dtype in ("int8", "int64", "bool"):
        values = [int(math.isfinite(value) and abs(value) < 100 and value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64).view(shape).to(getattr(torch, dtype))
    if len(shape) == 2 and draw(st.booleans()):
        tensor = tensor.T.contiguous().T
    return tensor


@anew
@given(data=st.data())
def test_tensors_of_any_kind_are_merged_rightly_or_refused(tmp_path, data):
    register()
    shape = data.draw(st.sampled_from(SHAPES))
    dtype = data.draw(st.sampled_from(DTYPES))
    models = {n: {"w": data.draw(tensors(shape, dtype))} for n in ("base", "one", "two")}
    if data.draw(st.booleans()):
        models["two"] = models["one"] = models["base"]
    fusion = data.draw(st.sampled_from(["task_arithmetic", "linear", "ties"]))
    draw = torch.Generator().manual_seed(1)
    probability = torch.rand(shape, generator=draw)
    place = tmp_path / f"{len(os.listdir(tmp_path))}"
    mask = {"w": probability} if math.prod(shape) else {"other": torch.rand(2)}
    masks = write_masks(place, mask, aliases={}, provenance={}, history=[])
    parameters = {"mask": str(place), "weight": {"one": 0.5, "two": 0.25}, "fusion": fusion}
    if fusion == "ties":
        parameters["density"] = 1.0
    try:
        found = merge_state_dicts(models, "somf", base="base", parameters=parameters)["w"]
    except ValueError as error:
        if not isinstance(error, RecipeError):
            # mergekit's own word on models whose whole numbers differ.
            assume("Non-floating buffer" not in str(error))
            raise
        # No merge that is right may be refused, but where float32 has no numbers for its parts.
        largest = max(float(m["w"].double().abs().max()) for m in models.values())
        reference = expected(models, masks, fusion)
        assert reference is None or largest > 1e38 or not reference.float().isfinite().all()
        return
    base = models["base"]["w"]
    assert (found.dtype, found.shape) == (base.dtype, base.shape)
    if all(torch.equal(m["w"].double(), base.double()) for m in models.values()):
        if fusion == "task_arithmetic":
            torch.testing.assert_close(found.double(), base.double(), rtol=1e-6, atol=0)
        return
    assert torch.isfinite(found.double()).all()
    reference = expected(models, masks, fusion)
    if reference is not None:
        # Sums are in float32, also those of float64.
        step = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
        apart = (found.double() - reference.double()).abs()
        largest = max(float(m["w"].double().abs().max()) for m in models.values())
        assert float(apart.max()) <= 4 * step * largest


def expected(models, masks, fusion):
    """The formula, in float64, rounded as the merge is; None where it is none of that fusion."""
    base = models["base"]["w"]
    if fusion != "task_arithmetic" or not base.numel() or not base.is_floating_point():
        return None
    p = masks.probabilities("w").double()
    change = sum(
        weight * (models[name]["w"].double() - base.double())
        for name, weight in (("one", 0.5), ("two", 0.25))
    )
    whole = base.double() + change * p / p.mean()
    # torch casts to some float8 by their largest number, which is no right result.
    beyond = whole.abs() > 1.035 * torch.finfo(base.dtype).max
    return whole.to(base.dtype).double().masked_fill(beyond, math.inf)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_looked_at(dtype):
    whole = torch.tensor([1.0, -2.0]).to(dtype)
    broken = torch.tensor([1.0, math.nan]).to(dtype)
    assert is_finite(whole)
    assert not is_finite(broken)
    assert are_equal(whole, whole.clone())
    assert not are_equal(whole, (-whole.float()).to(dtype))
    # As with other types, what is no number equals nothing.
    assert not are_equal(broken, broken.clone())


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_sums_that_a_type_can_not_hold_are_refused_and_those_it_can_are_right(tmp_path, dtype):
    register()
    largest = torch.finfo(getattr(torch, dtype)).max

    def merged(*values):
        names = ("base", "one", "two")
        models = {
            name: {"w": torch.tensor([value, 1.0]).to(getattr(torch, dtype))}
            for name, value in zip(names, values, strict=True)
        }
        place = tmp_path / f"{len(os.listdir(tmp_path))}"
        write_masks(place, {"w": torch.ones(2)}, aliases={}, provenance={}, history=[])
        given = {"mask": str(place), "weight": 1.0}
        return merge_state_dicts(models, "somf", base="base", parameters=given)["w"]

    # The parts go beyond the type on the way, and the sum does not.
    found = merged(-largest, largest, -largest)
    assert (found.dtype, found.tolist()) == (getattr(torch, dtype), [largest, 1.0])
    with pytest.raises(RecipeError, match="w: the merged tensor is not finite"):
        merged(0.0, largest, largest)
