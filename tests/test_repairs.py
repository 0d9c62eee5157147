"""The repairs as merge methods: whole merges, the models' roles, and what is refused."""

import shutil

import pytest
import tiny
import torch
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from repair_formulas import REFERENCE
from safetensors.torch import save_file

from somf_mergekit import RecipeError
from somf_mergekit.fusion import fusion_methods
from somf_mergekit.repairs.catalogue import REPAIRS

PARAMETERS = {
    "resta": {"gamma": 0.7},
    "safe_lora": {"threshold": 0.9},
    "safemerge": {"threshold": 0.9, "alpha": 0.3},
    "lox": {"alpha": 1.25, "rank": 3},
    "lssf": {"alpha": 0.8},
    "nlsr": {"beta": 0.4, "rank": 3, "share": 0.5, "threshold": 0.8},
}
# The folder of the family that has a role.
FOLDERS = {"fine_tuned": "math", "unaligned": "unaligned", "safety_tuned": "safety-tuned"}
EVERY = pytest.mark.parametrize("method", REPAIRS)


def recipe_of(family, method, roles=None, **parameters):
    models = []
    for role in roles or REPAIRS[method].needs:
        models.append({"model": str(family / FOLDERS.get(role, role))})
        if role != "fine_tuned":
            models[-1]["parameters"] = {"role": role}
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "models": models,
        "parameters": parameters or PARAMETERS[method],
        "dtype": "float32",
    }


def weights_of(family, roles):
    """The tensors of the family's models by role, the aligned one among them."""
    found = {role: tiny.tensors_of(family / FOLDERS[role]) for role in roles}
    return {"aligned": tiny.tensors_of(family / "base"), **found}


def of_tensor(models, name):
    return {role: tensors[name] for role, tensors in models.items()}


def assert_repaired(found, models, method, parameters):
    assert set(found) == set(models["aligned"])
    for name, tensor in found.items():
        expected = REFERENCE[method](of_tensor(models, name), **parameters)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_written_merge_is_the_formula_and_in_memory_the_same_bit_for_bit(
    family, tmp_path, method
):
    written = tiny.merged(recipe_of(family, method), tmp_path / "out")
    models = weights_of(family, REPAIRS[method].needs)
    assert_repaired(written, models, method, PARAMETERS[method])
    matrices = [name for name, tensor in written.items() if tensor.dim() == 2]
    changed = [n for n in matrices if not torch.equal(written[n], models["fine_tuned"][n])]
    assert changed, "nothing was repaired"
    roles = {role: role for role in REPAIRS[method].needs}
    # What a model is by default need not be said; the order of the models says nothing.
    found = merge_state_dicts(
        dict(reversed(models.items())),
        method,
        base="aligned",
        parameters={"role": roles, **PARAMETERS[method]},
    )
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor), name


def test_a_check_says_that_nothing_is_learned(family, tmp_path):
    file = tiny.write_recipe(tmp_path / "recipe.yml", recipe_of(family, "lox"))
    checked = tiny.invoke("mergekit-somf", "check", file)
    assert checked.exit_code == 0, checked.output
    count = len(tiny.tensors_of(family / "base"))
    assert checked.stdout == f"recipe: OK. {count} tensors; nothing is learned.\n"


def test_defaults(family, tmp_path):
    for method, repair in REPAIRS.items():
        recipe = recipe_of(family, method)
        del recipe["parameters"]
        found = tiny.merged(recipe, tmp_path / method)
        values = {p.name: p.default for p in repair.parameters if p.name != "role"}
        assert_repaired(found, weights_of(family, repair.needs), method, values)


def test_lox_strengthens_the_aligned_model_where_there_is_no_fine_tuned_one(family, tmp_path):
    found = tiny.merged(recipe_of(family, "lox", ["unaligned"]), tmp_path / "out")
    assert_repaired(found, weights_of(family, ["unaligned"]), "lox", PARAMETERS["lox"])


def test_parameters_may_differ_between_tensors(family, tmp_path):
    recipe = recipe_of(
        family,
        "lox",
        rank=[{"filter": "mlp", "value": 2}, {"value": 5}],
        alpha=[{"filter": "embed_tokens", "value": 0}, {"value": [0.2, 0.6]}],
    )
    found = tiny.merged(recipe, tmp_path / "out")
    models = weights_of(family, REPAIRS["lox"].needs)
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(found[embeddings], models["fine_tuned"][embeddings])
    for layer, alpha in ((0, 0.2), (1, 0.6)):
        for part, rank in (("mlp.up_proj", 2), ("self_attn.q_proj", 5)):
            name = f"model.layers.{layer}.{part}.weight"
            expected = REFERENCE["lox"](of_tensor(models, name), alpha=alpha, rank=rank)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_roles_under_the_sources_of_slices(family, tmp_path):
    recipe = recipe_of(family, "resta")
    # mergekit adds the base to a list of models, not to slices.
    models = [*recipe.pop("models"), {"model": recipe["base_model"]}]
    recipe["slices"] = [{"sources": [{**model, "layer_range": [0, 2]} for model in models]}]
    found = tiny.merged(recipe, tmp_path / "out")
    assert_repaired(found, weights_of(family, REPAIRS["resta"].needs), "resta", {"gamma": 0.7})
    del recipe["slices"][0]["sources"][1]["parameters"]
    message = tiny.refused(recipe, tmp_path)
    assert "slices[0].sources: no unaligned model: resta needs one" in message


def test_a_repair_of_a_merge_of_two(family, tmp_path):
    weights = {"parameters": {"weight": 0.5}}
    first = {
        "name": "merged",
        "merge_method": "linear",
        "models": [{"model": str(family / name), **weights} for name in ("math", "code")],
        "dtype": "float32",
    }
    second = recipe_of(family, "resta")
    second["models"][0]["model"] = "merged"
    tiny.merged_in_steps([first, second], tmp_path)
    models = weights_of(family, ["fine_tuned", "unaligned"])
    code = tiny.tensors_of(family / "code")
    models["fine_tuned"] = {n: (t + code[n]) / 2 for n, t in models["fine_tuned"].items()}
    assert_repaired(tiny.tensors_of(tmp_path / "out"), models, "resta", PARAMETERS["resta"])


@EVERY
def test_sums_are_in_float32_and_rounded_once(method):
    draw = torch.Generator().manual_seed(0)
    ids = ["aligned", *REPAIRS[method].needs]
    tensors = [torch.randn(24, 16, generator=draw).bfloat16() for _ in ids]
    parameters = {"role": {role: role for role in ids[1:]}, **PARAMETERS[method]}
    found = merge_tensors(tensors, method, ids=ids, base_index=0, parameters=parameters, name="w")
    assert found.dtype == torch.bfloat16
    expected = REFERENCE[method](dict(zip(ids, tensors, strict=True)), **PARAMETERS[method])
    # Half a step of bfloat16.
    torch.testing.assert_close(found.double(), expected, rtol=1 / 256, atol=1e-6)


def group_of(tensors):
    entries = tuple(TensorEntry(role, t, role == "aligned") for role, t in tensors.items())
    return TensorGroup(entries, TensorMetadata(name="attn.bias"))


@EVERY
@pytest.mark.parametrize(
    "buffer",
    [torch.ones(4, 4, dtype=torch.bool), torch.arange(4), torch.full((2, 2), -torch.inf)],
    ids=["bool", "int", "-inf"],
)
def test_a_buffer_that_all_models_share_is_kept(method, buffer):
    ids = ["aligned", *REPAIRS[method].needs]
    group = group_of({role: buffer.clone() for role in ids})
    values = {"role": {role: role for role in ids[1:]}, **PARAMETERS[method]}
    found = get(method).merge_group(group, **values)
    assert found.dtype == buffer.dtype
    assert torch.equal(found, buffer)


def test_a_result_that_the_dtype_can_not_hold_is_refused():
    tensors = [torch.full((2, 2), value, dtype=torch.float16) for value in (3e4, 3e4, -3e4)]
    with pytest.raises(RecipeError, match=r"w: resta gives numbers that torch.float16 can't hold"):
        merge_tensors(
            tensors,
            "resta",
            ids=["aligned", "math", "old"],
            base_index=0,
            parameters={"role": {"math": "fine_tuned", "old": "unaligned"}, "gamma": 1.0},
            name="w",
        )


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["fine_tuned", "fine_tuned"], "model1 is fine_tuned, and resta takes one model each"),
        (["unaligned", "safety_tuned"], "model1 is safety_tuned, and resta takes one model each"),
        (["unaligned", "unaligned"], "model1 is unaligned, and resta takes one model each"),
        (["unaligned"], ": Merge method requires at least 2 non-base inputs"),
    ],
)
def test_roles_in_memory(roles, said):
    ids = [f"model{number}" for number in range(len(roles))]
    with pytest.raises(RecipeError, match=said):
        merge_tensors(
            [torch.ones(2, 2)] * (len(roles) + 1),
            "resta",
            ids=["base", *ids],
            base_index=0,
            parameters={"role": dict(zip(ids, roles, strict=True))},
            name="w",
        )


def test_repairs_are_no_fusions_of_somf(family_recipe, tmp_path):
    assert not set(REPAIRS) & set(fusion_methods.known_fusions())
    message = tiny.refused(family_recipe(fusion="resta"), tmp_path)
    assert "'resta' isn't a method of mergekit that is known" in message


@pytest.fixture
def unread(tmp_path, monkeypatch):
    """Merge a recipe that its text shows to be wrong; return the message. No file is opened."""

    def no_loader(self, model):
        raise AssertionError(f"{model} was looked at")

    monkeypatch.setattr(LoaderCache, "get", no_loader)
    return lambda recipe: tiny.refused(recipe, tmp_path)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("resta", {"gamma": float("nan")}, "parameters.gamma: nan is not a number >= 0 and <= 100"),
        ("resta", {"gamma": float("inf")}, "parameters.gamma: inf is not a number >= 0"),
        ("resta", {"gamma": -1}, "parameters.gamma: -1 is not a number >= 0"),
        ("resta", {"gamma": True}, "parameters.gamma: True is not a number"),
        ("resta", {"gamma": [0.5, "much"]}, "parameters.gamma: 'much' is not a number"),
        ("resta", {"gama": 1}, "gama: unknown parameter (did you mean 'gamma'?); resta has role,"),
        ("resta", {"role": "unaligned"}, "parameters.role: is said of one model; move it"),
        ("safe_lora", {"threshold": 1.5}, "threshold: 1.5 is not a number >= -1 and <= 1"),
        ("safemerge", {"threshold": -2}, "threshold: -2 is not a number >= -1 and <= 1"),
        ("safemerge", {"alpha": 1.01}, "alpha: 1.01 is not a number >= 0 and <= 1"),
        ("lox", {"rank": 0}, "parameters.rank: 0 is not a whole number >= 1"),
        ("lox", {"rank": 1.5}, "parameters.rank: 1.5 is not a whole number >= 1"),
        ("lox", {"rank": [2, 4]}, "parameters.rank: whole numbers have no values between"),
        (
            "lox",
            {"rank": [{"filter": "mlp", "value": [2, 4]}, {"value": 1}]},
            "parameters.rank: whole numbers have no values between",
        ),
        ("lssf", {"rank": 4}, "parameters.rank: unknown parameter; lssf has role, alpha"),
        ("nlsr", {"share": 0}, "parameters.share: 0 is not a number > 0 and <= 1"),
    ],
)
def test_parameters(unread, family, method, parameters, said):
    assert said in unread(recipe_of(family, method, **parameters))


@pytest.mark.parametrize(
    ("method", "roles", "said"),
    [
        ("resta", ["fine_tuned"], "models: no unaligned model: resta needs one beside base_model"),
        ("resta", ["unaligned"], "models: no fine_tuned model: resta needs one beside base_model"),
        ("safemerge", ["fine_tuned", "unaligned"], "with `parameters: {role: safety_tuned}`"),
        ("lox", ["fine_tuned"], "models: no unaligned model: lox needs one"),
        (
            "lssf",
            ["fine_tuned", "unaligned", "safety_tuned"],
            "lssf takes no safety_tuned model",
        ),
        ("nlsr", ["fine_tuned", "aligned"], "role: 'aligned' is not `fine_tuned` or `unaligned`"),
    ],
)
def test_roles(unread, family, method, roles, said):
    assert said in unread(recipe_of(family, method, roles))


def test_two_models_of_a_role(unread, family):
    recipe = recipe_of(family, "resta")
    recipe["models"].append({"model": str(family / "code")})
    message = unread(recipe)
    assert (
        f"{family / 'math'}, {family / 'code'} are all fine_tuned, and resta takes one" in message
    )
    assert "merge them first, in a step of a mergekit-multi file, or name their role" in message
    recipe["models"][2]["parameters"] = {"role": "unaligned"}
    message = unread(recipe)
    assert f"{family / 'unaligned'}, {family / 'code'} are all unaligned" in message
    assert "mergekit-multi" not in message


def test_the_base_has_no_role_and_need_not_be_listed(unread, family):
    recipe = recipe_of(family, "resta")
    recipe["models"].append({"model": recipe["base_model"], "parameters": {"role": "unaligned"}})
    assert "is base_model, the aligned model; it has no role" in unread(recipe)


def test_the_base_may_be_listed(family, tmp_path):
    recipe = recipe_of(family, "resta")
    recipe["models"].insert(0, {"model": recipe["base_model"]})
    found = tiny.merged(recipe, tmp_path / "out")
    assert_repaired(found, weights_of(family, REPAIRS["resta"].needs), "resta", {"gamma": 0.7})


def test_all_mistakes_are_reported_together(unread, family):
    recipe = recipe_of(family, "nlsr", ["fine_tuned"], share=2, bta=1)
    recipe["models"][0]["parameters"] = {"threshold": 0.5, "role": ["fine_tuned"]}
    recipe["chat_templat"] = "x"
    del recipe["base_model"]
    message = unread(recipe)
    # What is missing is not reported while a role is not known.
    assert "6 problems" in message
    assert "nlsr needs one beside base_model" not in message
    for said in (
        "chat_templat: unknown key (did you mean 'chat_template'?)",
        "base_model is missing: nlsr needs the aligned model",
        "parameters.share: 2 is not a number > 0 and <= 1",
        "parameters.bta: unknown parameter (did you mean 'beta'?)",
        "models[0].parameters.threshold: all models share one value; move it out of the model",
        "models[0].parameters.role: takes one value for all tensors, no list and no filter",
    ):
        assert said in message


def test_a_model_that_is_not_there(unread, family):
    recipe = recipe_of(family, "resta")
    recipe["models"][1]["model"] = "/nowhere/model"
    assert "model /nowhere/model: there is no such folder" in unread(recipe)


def test_a_filter_that_is_in_no_name(family, tmp_path):
    recipe = recipe_of(family, "resta", gamma=[{"filter": "attn_out", "value": 0}, {"value": 1}])
    message = tiny.refused(recipe, tmp_path)
    assert "parameters.gamma: no tensor has 'attn_out' in its name" in message


def test_a_model_named_twice(family, tmp_path):
    recipe = recipe_of(family, "resta")
    recipe["models"][1]["model"] = recipe["models"][0]["model"]
    assert f"models[1].model: {family / 'math'} is there twice" in tiny.refused(recipe, tmp_path)


def test_another_vocabulary(family, tmp_path):
    tokenizer = tiny.tiny_tokenizer(extra_tokens=["<x>", "<y>"])
    tokenizer.add_tokens(["<z>"])
    model = tiny.tiny_llama(1, len(tokenizer))
    tiny.save_model(model, tokenizer, tmp_path / "longer")
    recipe = recipe_of(family, "safe_lora")
    recipe["models"][1]["model"] = str(tmp_path / "longer")
    message = tiny.refused(recipe, tmp_path)
    assert (
        f"model.embed_tokens.weight: shape {len(tokenizer)}x32 in {tmp_path / 'longer'}" in message
    )
    assert "with another vocabulary, add `tokenizer: {source: base}`" in message
    recipe["tokenizer"] = {"source": "base"}
    found = tiny.merged(recipe, tmp_path / "out")
    base = tiny.tensors_of(family / "base")
    assert found["model.embed_tokens.weight"].shape == base["model.embed_tokens.weight"].shape
    name = "model.layers.0.mlp.up_proj.weight"
    models = weights_of(family, ["fine_tuned"])
    models["unaligned"] = model.state_dict()
    expected = REFERENCE["safe_lora"](of_tensor(models, name), **PARAMETERS["safe_lora"])
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_another_shape(family, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tiny.save_model(tiny.tiny_llama(0, len(tokenizer), hidden=48), tokenizer, tmp_path / "wide")
    recipe = recipe_of(family, "nlsr")
    recipe["models"][1]["model"] = str(tmp_path / "wide")
    message = tiny.refused(recipe, tmp_path)
    assert "self_attn.q_proj.weight: shape 48x48" in message
    assert "all models must come from the same base" in message


@EVERY
def test_weights_that_are_not_finite(family, tmp_path, method):
    shutil.copytree(family / "unaligned", tmp_path / "broken")
    tensors = tiny.tensors_of(tmp_path / "broken")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(family, method)
    recipe["models"][1]["model"] = str(tmp_path / "broken")
    message = tiny.refused(recipe, tmp_path)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert f"{tmp_path / 'broken'} has NaN or infinite entries" in message
