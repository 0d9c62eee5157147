"""Every example runs as it is written, with tiny models under the names that it gives."""

import copy
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import merge_tensors
from repair_formulas import REFERENCE

from somf_mergekit import MaskSet
from somf_mergekit.mask import noise
from somf_mergekit.mask.writing import write_masks
from somf_mergekit.recipe import settings as recipe
from somf_mergekit.recipe.presets import preset_values
from somf_mergekit.repairs.catalogue import REPAIRS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples/yaml").glob("*.yml"))


def recipes_in(example):
    """The recipes of an example: one, or the steps of a mergekit-multi file."""
    return list(yaml.safe_load_all(example.read_text()))


# The last step decides what an example is of.
WITH_REPAIRS = [e for e in EXAMPLES if recipes_in(e)[-1]["merge_method"] in REPAIRS]
ALONE, TOGETHER = (ROOT / f"examples/yaml/{n}.yml" for n in ("specialist-mask", "compose-masks"))
WITH_MASKS = [e for e in EXAMPLES if e not in (*WITH_REPAIRS, ALONE, TOGETHER)]
BASE = "org/aligned-chat-model"


def labelled_rows():
    """Preference pairs with PKU-SafeRLHF's columns."""
    return [
        {
            "prompt": row["prompt"],
            "response_0": row["rejected"],
            "response_1": row["chosen"],
            "is_response_0_safe": False,
            "is_response_1_safe": True,
        }
        for row in tiny.preference_rows()
    ]


def save_adapter(base, seed, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def before_alignment(model):
    """A model that differs from another in few directions of each matrix."""
    changed = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in changed.parameters():
            if weight.dim() == 2:
                left, right = (torch.randn(n, 2, generator=draw) for n in weight.shape)
                weight.add_(0.02 * left @ right.T)
    return changed


@pytest.fixture(scope="module")
def hub(tmp_path_factory, family):
    """A folder with everything that the examples name, where they expect it.

    Whoever looks for a hub's id finds a folder of that name first.
    """
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    for name, stored in (("aligned-chat-model", "base"), ("math-specialist", "math")):
        (root / "org" / name).symlink_to(family / stored)
    (root / "org/code-specialist").symlink_to(family / "code")
    (root / "org/safety-tuned-model").symlink_to(family / "safety-tuned")
    tokenizer = tiny.tiny_tokenizer()
    base = tiny.tiny_llama(0, len(tokenizer))
    tiny.save_model(tiny.perturbed(base, 3), tokenizer, root / "org/law-specialist")
    tiny.save_model(before_alignment(base), tokenizer, root / "org/unaligned-model")
    for seed, name in enumerate(("math-adapter", "code-adapter")):
        save_adapter(family / "base", seed, root / "org" / name)
    (root / "safety_pairs.jsonl").symlink_to(family / "pairs.jsonl")
    instructions = [{"instruction": "make a cake", "input": "", "output": "mix flour with sugar"}]
    for name, rows in (
        ("PKU-Alignment/PKU-SafeRLHF", labelled_rows()),
        ("PKU-Alignment/PKU-SafeRLHF-10K", labelled_rows()),
        ("tatsu-lab/alpaca", instructions * 8),
    ):
        (root / name).mkdir(parents=True)
        tiny.write_jsonl(root / name / "train.jsonl", rows)
    return root


@pytest.fixture
def workplace(hub, tmp_path, monkeypatch):
    """The current folder, from which an example's command is run."""
    for part in hub.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    # mergekit would look for an adapter's merge where an earlier example has put it.
    monkeypatch.setattr(LoaderCache, "loaders", {})
    return tmp_path


def head_of(example):
    return example.read_text().split("\n\n", 1)[0]


def run_as_told(example):
    """Run the command that the example opens with; return the folder that it writes."""
    (line,) = [part for part in head_of(example).splitlines() if part.startswith("#   ")]
    program, *arguments = shlex.split(line.removeprefix("#"))
    at = next(place for place, word in enumerate(arguments) if word.endswith(".yml"))
    assert ROOT / arguments[at] == example
    arguments[at] = example
    # The card would ask the hub about the models: their names look like the hub's.
    result = tiny.invoke(program, *arguments, "--no-write-model-card", "--quiet")
    assert result.exit_code == 0, result.output
    (out,) = [word for word in arguments if str(word).startswith(("out", "math-mask"))]
    return Path(out)


def overwrite_mask(folder):
    """Put random probabilities in a learned mask's place: few steps leave it near its start."""
    masks = MaskSet.open(folder)
    draw = torch.Generator().manual_seed(0)
    probabilities = {
        name: (torch.randint(0, 256, masks.entries(name).shape, generator=draw) + 0.5) / 256
        for name in masks.stored_names()
    }
    layouts = {name: masks.layout(name) for name in masks.stored_names()}
    header = masks.header
    shutil.rmtree(folder)
    return write_masks(
        folder,
        probabilities,
        aliases=header.aliases,
        layouts=layouts,
        provenance=masks.provenance,
        history=[],
    )


def model_tensors(name):
    """The tensors of a model, or of base+adapter."""
    base, _, adapter = name.partition("+")
    if not adapter:
        return tiny.tensors_of(base)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


def expected_tensors(content, masks):
    """The recipe's fusion of base + delta * m / mean(m), by mergekit, tensor by tensor."""
    dtype = getattr(torch, content["dtype"])
    ours = content["parameters"]
    fusion = ours.get("fusion", "task_arithmetic")
    names = [model["model"] for model in content["models"]]
    own = {parameter.name for parameter in recipe.parameters()}
    parameters = {key: value for key, value in ours.items() if key not in own}
    weights = [model.get("parameters", {}).get("weight") for model in content["models"]]
    if None not in weights:
        parameters["weight"] = dict(zip(names, weights, strict=True))
    base, *models = (
        {key: tensor.to(dtype).float() for key, tensor in model_tensors(name).items()}
        for name in (content["base_model"], *names)
    )
    merged = {}
    for name, start in base.items():
        factor = torch.ones(1)
        if name in masks:
            mask = masks.probabilities(name)
            if ours.get("mask_kind") == "binary":
                mask = (mask > 0.5).float()
            elif ours.get("preset") == "paper":
                key = noise.noise_key(seed=ours.get("seed", 0), step=-1, name=name)
                u = noise.uniform_noise(key, mask.numel()).view(mask.shape)
                mask = torch.sigmoid((torch.logit(mask) + torch.logit(u)) / 0.5)
            factor = mask * (1 / mask.mean().item())
        tensors = [start + (model[name] - start) * factor for model in models]
        with_base = fusion != "linear"
        seed = f"fusion/{ours.get('seed', 0)}/{name}".encode()
        with torch.random.fork_rng():
            digest = hashlib.blake2b(seed, digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little", signed=True))
            result = merge_tensors(
                [start, *tensors] if with_base else tensors,
                fusion,
                parameters=parameters,
                ids=["base", *names] if with_base else names,
                base_index=0 if with_base else None,
                name=name,
            )
        merged[name] = result.to(getattr(torch, content.get("out_dtype", content["dtype"])))
    return merged


def assert_equal_but_for_rounding(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        # One step of bfloat16.
        torch.testing.assert_close(found[name], tensor, rtol=1 / 128, atol=1e-6)


def resolved(content):
    """Every setting of a recipe: its own, else its preset's, else the default."""
    parameters = content["parameters"]
    values = {parameter.name: parameter.default for parameter in recipe.parameters()}
    values |= preset_values(MergeConfiguration.model_validate(content))
    values["beta"] = 5.0 if values["objective"] == "dpo_norm" else 0.1
    values |= {key: value for key, value in parameters.items() if key in values}
    return {
        key: ",".join(value) if isinstance(value, list) else value for key, value in values.items()
    }


def has_masks_of_heads_and_rows(artifact):
    masks = MaskSet.open(artifact)
    shapes = {name: tuple(masks.entries(name).shape) for name in masks.names()}
    layer = "model.layers.0."
    assert shapes[layer + "self_attn.q_proj.weight"] == (4, 1)
    assert shapes[layer + "self_attn.k_proj.weight"] == (2, 1)
    assert shapes[layer + "self_attn.o_proj.weight"] == (1, 4)
    assert shapes[layer + "mlp.up_proj.weight"] == (64, 1)
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(shapes)


def has_a_utility_curve(artifact):
    assert MaskSet.open(artifact).provenance["utility_dataset"]["examples"] == 8
    rows = (artifact / "training.jsonl").read_text().splitlines()
    assert all(json.loads(row)["utility"] >= 0 for row in rows)


def has_masks_where_adapters_are(artifact):
    names = MaskSet.open(artifact).names()
    assert len(names) == 4
    assert all("q_proj" in name or "up_proj" in name for name in names)


FURTHER = {
    "coarse-mask": has_masks_of_heads_and_rows,
    "keep-the-skills": has_a_utility_curve,
    "lora-adapters": has_masks_where_adapters_are,
}


@pytest.mark.parametrize("example", WITH_MASKS, ids=lambda path: path.stem)
def test_an_example_writes_its_fusion_of_the_masked_models(example, workplace):
    content = yaml.safe_load(example.read_text())
    artifact = run_as_told(example) / "somf"
    reported = json.loads((artifact / "somf.json").read_text())
    assert reported["settings"] == resolved(content)
    assert yaml.safe_load(reported["recipe"]) == content
    assert reported["steps"] > 1
    FURTHER.get(example.stem, lambda _: None)(artifact)
    # What is used is what is in the file, and a random mask is far from doing nothing.
    masks = overwrite_mask(artifact)
    out = run_as_told(example)
    assert_equal_but_for_rounding(tiny.tensors_of(out), expected_tensors(content, masks))


def test_masks_learned_alone_as_an_example_says_are_put_together_as_another_says(
    workplace, monkeypatch
):
    content = yaml.safe_load(ALONE.read_text())
    learned = run_as_told(ALONE)
    assert {*MaskSet.open(learned).provenance["models"]} == {BASE, "org/math-specialist"}
    # The other specialist's author does the same.
    content["models"][0]["model"] = "org/code-specialist"
    other = tiny.write_recipe(workplace / "other.yml", content)
    assert tiny.invoke("mergekit-somf", "learn", other, "code-mask").exit_code == 0
    content = yaml.safe_load(TOGETHER.read_text())
    places = {"math": learned, "code": "code-mask"}
    masks = {}
    for name, place in places.items():
        published = workplace / f"org/{name}-specialist-mask"
        if not published.exists():
            Path(place).rename(published)
        masks[f"org/{name}-specialist"] = MaskSet.open(published)
    found = tiny.tensors_of(run_as_told(TOGETHER))
    base = model_tensors(content["base_model"])
    expected = {name: start.to(torch.bfloat16).float() for name, start in base.items()}
    for model, own in masks.items():
        for name, tensor in model_tensors(model).items():
            mask = own.probabilities(name)
            change = tensor.to(torch.bfloat16).float() - base[name].to(torch.bfloat16).float()
            expected[name] = expected[name] + 0.5 * change * mask / mask.mean()
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in expected.items()}
    assert_equal_but_for_rounding(found, expected)


def value_for(setting, name):
    """What a parameter is for a tensor of a model of two layers: filters, then gradients."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        setting = next(s["value"] for s in setting if s.get("filter", "") in name)
    if isinstance(setting, list):
        # What is in no layer has the first value.
        return setting[-1 if "layers.1." in name else 0]
    return setting


def models_by_role(content, steps):
    """The tensors of the models that a repair's recipe names, also those of steps before it."""
    models = {"aligned": tiny.tensors_of(content["base_model"])}
    for model in content["models"]:
        role = model.get("parameters", {}).get("role", "fine_tuned")
        models[role] = steps.get(model["model"]) or model_tensors(model["model"])
    return models


def repaired_tensors(content, models):
    """The repair's formula, tensor by tensor."""
    method = content["merge_method"]
    settings = {p.name: p.default for p in REPAIRS[method].parameters if p.name != "role"}
    assert set(content["parameters"]) <= set(settings)
    settings |= content["parameters"]
    repaired = {}
    for name in models["aligned"]:
        values = {key: value_for(setting, name) for key, setting in settings.items()}
        tensors = {role: weights[name] for role, weights in models.items()}
        result = REFERENCE[method](tensors, **values)
        repaired[name] = result.to(getattr(torch, content["out_dtype"]))
    return repaired


@pytest.mark.parametrize("example", WITH_REPAIRS, ids=lambda path: path.stem)
def test_an_example_writes_what_its_repair_says(example, workplace):
    *before, content = recipes_in(example)
    steps = {step["name"]: expected_tensors({"parameters": {}, **step}, ()) for step in before}
    models = models_by_role(content, steps)
    found = tiny.tensors_of(run_as_told(example))
    assert_equal_but_for_rounding(found, repaired_tensors(content, models))
    start = models.get("fine_tuned", models["aligned"])
    assert any(not torch.equal(tensor, start[name].bfloat16()) for name, tensor in found.items())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_with_what_it_needs_and_is_short(example):
    lines = example.read_text().splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    head = head_of(example)
    assert all(line.startswith("#") for line in head.splitlines())
    assert "\n# Needs: " in head


def test_the_list_of_examples_names_every_one():
    text = (ROOT / "examples/README.md").read_text()
    assert EXAMPLES
    for example in EXAMPLES:
        assert f"({example.relative_to(ROOT / 'examples')})" in text
