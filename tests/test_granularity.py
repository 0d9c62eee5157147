"""Coarser masks: what an entry covers, in learning, in the artifact and in the merge."""

import itertools
import json

import pytest
import tiny
import torch

from somf_mergekit import MaskSet
from somf_mergekit.mask.granularity import (
    GRANULARITIES,
    Layout,
    Storage,
    mask_layout,
    weight_storage,
)

QUERY = "model.layers.0.self_attn.q_proj.weight"
OUTPUT = "model.layers.0.self_attn.o_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("granularity", "name", "shape", "layout"),
    [
        ("weight", UP, (6, 8), Layout((6, 8))),
        ("row", UP, (6, 8), Layout((6, 1))),
        ("row", NORM, (8,), Layout((8,))),
        ("row", "transformer.h.0.mlp.c_fc.weight", (6, 8), Layout((1, 8))),
        ("column", UP, (6, 8), Layout((1, 8))),
        ("column", NORM, (8,), Layout((1,))),
        ("tensor", UP, (6, 8), Layout((1, 1))),
        ("tensor", NORM, (8,), Layout((1,))),
        ("head", QUERY, (16, 8), Layout((4, 1), 0, 4)),
        ("head", "model.layers.0.self_attn.k_proj.bias", (8,), Layout((2,), 0, 4)),
        ("head", OUTPUT, (8, 16), Layout((1, 4), 1, 4)),
        ("head", UP, (6, 8), Layout((6, 1))),
        (
            "head",
            "gpt_neox.layers.0.attention.query_key_value.weight",
            (24, 8),
            Layout((2, 1), 0, 12),
        ),
        ("head", "transformer.h.0.attn.c_attn.weight", (8, 24), Layout((1, 6), 1, 4)),
        ("head", "transformer.h.0.attn.c_proj.weight", (8, 8), Layout((2, 1), 0, 4)),
        ("head", QUERY, (15, 8), Layout((15, 1))),
    ],
)
def test_what_an_entry_covers(granularity, name, shape, layout):
    assert (
        mask_layout(
            granularity, name, shape, Storage(4, inputs_first=name.startswith("transformer."))
        )
        == layout
    )


@pytest.mark.parametrize(
    "layout",
    [
        Layout((6, 8)),
        Layout((6, 1)),
        Layout((1, 8)),
        Layout((1, 1)),
        Layout((2, 1), 0, 3),
        Layout((1, 2), 1, 4),
    ],
    ids=str,
)
def test_expanding_and_reducing_are_each_others_transpose(layout):
    entries = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0))
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    owner = torch.zeros(6, 8, dtype=torch.int64)
    for row, column in itertools.product(range(6), range(8)):
        place = [min(row, layout.shape[0] - 1), min(column, layout.shape[1] - 1)]
        if layout.repeat > 1:
            place[layout.axis] = (row, column)[layout.axis] // layout.repeat
        owner[row, column] = place[0] * layout.shape[1] + place[1]
    whole = layout.expand(entries).expand(6, 8)
    assert torch.equal(whole, entries.flatten()[owner])
    summed = torch.zeros(entries.numel()).index_add(0, owner.flatten(), values.flatten())
    torch.testing.assert_close(layout.reduce(values), summed.view(layout.shape))


def test_storage_is_the_configurations():
    from transformers import AutoConfig

    def storage(*arguments, **options):
        return weight_storage(AutoConfig.for_model(*arguments, **options))

    assert storage("llama", hidden_size=32, num_attention_heads=4) == Storage(8, hidden_size=32)
    assert storage("gemma2", hidden_size=32, head_dim=16) == Storage(16, hidden_size=32)
    assert storage("gpt2", n_embd=32, n_head=2) == Storage(16, True, 32)
    assert storage("gpt_oss", hidden_size=32, head_dim=16) == Storage(16, True, 32)
    assert storage("deepseek_v3", hidden_size=32).head_width == 0


# Of a tensor: the entries of a row, a column and a head mask, a size or 1 for each of its axes.
MODELS = {
    "qwen3_next": {
        "layers.0.linear_attn.conv1d.weight": ((8192, 1, 4), "8192 1 1", "8192 1 1"),
        "layers.0.linear_attn.A_log": ((32,), "32", "1"),
        "layers.0.linear_attn.dt_bias": ((32,), "32", "1"),
        "layers.0.linear_attn.norm.weight": ((128,), "128", "1"),
        "layers.0.linear_attn.in_proj_qkvz.weight": ((12288, 2048), "12288 1", "1 2048"),
        "layers.0.mlp.gate.weight": ((512, 2048), "512 1", "1 2048"),
        "layers.0.mlp.experts.7.down_proj.weight": ((2048, 512), "2048 1", "1 512"),
        "layers.0.mlp.shared_expert_gate.weight": ((1, 2048), "1 1", "1 2048"),
        "layers.3.self_attn.q_proj.weight": ((8192, 2048), "8192 1", "1 2048", "32 1"),
        "layers.3.self_attn.q_norm.weight": ((256,), "256", "1"),
    },
    "falcon_h1": {
        "layers.0.mamba.conv1d.weight": ((3328, 1, 4), "3328 1 1", "3328 1 1"),
        "layers.0.mamba.conv1d.bias": ((3328,), "3328", "1"),
        "layers.0.mamba.D": ((48,), "48", "1"),
        "layers.0.mamba.in_proj.weight": ((6448, 2048), "6448 1", "1 2048"),
    },
    "lfm2": {
        "layers.0.conv.conv.weight": ((2048, 1, 3), "2048 1 1", "2048 1 1"),
        "layers.0.conv.in_proj.weight": ((6144, 2048), "6144 1", "1 2048"),
        "layers.2.self_attn.out_proj.weight": ((2048, 2048), "2048 1", "1 2048", "1 32"),
    },
    "granitemoehybrid": {
        "layers.0.block_sparse_moe.input_linear.weight": (
            (64, 1024, 1536),
            "64 1024 1",
            "64 1 1536",
        ),
        "layers.0.block_sparse_moe.router.layer.weight": ((64, 1536), "64 1", "1 1536"),
        "layers.0.mamba.conv1d.weight": ((3328, 1, 4), "3328 1 1", "3328 1 1"),
    },
    "nemotron_h": {
        "layers.0.mixer.conv1d.weight": ((12288, 1, 4), "12288 1 1", "12288 1 1"),
        "layers.0.mixer.dt_bias": ((128,), "128", "1"),
        "layers.7.mixer.o_proj.weight": ((4096, 4096), "4096 1", "1 4096", "1 32"),
        "layers.0.mixer.out_proj.weight": ((4096, 8192), "4096 1", "1 8192"),
    },
    "gpt_oss": {
        "layers.0.mlp.experts.gate_up_proj": ((32, 2880, 5760), "32 1 5760", "32 2880 1"),
        "layers.0.mlp.experts.down_proj": ((32, 2880, 2880), "32 1 2880", "32 2880 1"),
        "layers.0.mlp.experts.gate_up_proj_bias": ((32, 5760), "32 5760", "32 1"),
        "layers.0.mlp.router.bias": ((32,), "32", "1"),
        "layers.0.self_attn.sinks": ((64,), "64", "1"),
    },
    "llama4_text": {
        "layers.0.feed_forward.experts.gate_up_proj": (
            (16, 5120, 16384),
            "16 1 16384",
            "16 5120 1",
        ),
        "layers.0.feed_forward.experts.down_proj": ((16, 8192, 5120), "16 1 5120", "16 8192 1"),
        "layers.0.feed_forward.router.weight": ((16, 5120), "16 1", "1 5120"),
    },
    # As published, and as transformers has it in memory.
    "qwen3_vl_moe_text": {
        "layers.0.mlp.experts.gate_up_proj": ((128, 2048, 1536), "128 1 1536", "128 2048 1"),
        "layers.0.mlp.experts.down_proj": ((128, 768, 2048), "128 1 2048", "128 768 1"),
        "layers.1.mlp.experts.gate_up_proj": ((128, 1536, 2048), "128 1536 1", "128 1 2048"),
        "layers.1.mlp.experts.down_proj": ((128, 2048, 768), "128 2048 1", "128 1 768"),
        "visual.patch_embed.proj.weight": ((1152, 3, 2, 16, 16), "1152 1 1 1 1", "1 3 1 1 1"),
    },
}
SIZES = {
    "qwen3_next": (2048, 256),
    "falcon_h1": (2048, 64),
    "lfm2": (2048, 64),
    "granitemoehybrid": (1536, 128),
    "nemotron_h": (4096, 128),
    "gpt_oss": (2880, 64),
    "llama4_text": (5120, 128),
    "qwen3_vl_moe_text": (2048, 128),
}


@pytest.mark.parametrize("model", MODELS)
def test_hybrid_layers_and_experts_have_rows_and_columns(model):
    from transformers import AutoConfig

    hidden, width = SIZES[model]
    sizes = {"hidden_size": hidden, "head_dim": width, "num_attention_heads": hidden // width}
    if model in ("lfm2", "granitemoehybrid", "falcon_h1"):
        sizes.pop("head_dim")
    storage = weight_storage(AutoConfig.for_model(model, **sizes))
    assert storage.head_width == width
    for name, (shape, row, column, *head) in MODELS[model].items():
        expected = {"row": row, "column": column, "head": head[0] if head else row}
        for granularity, entries in expected.items():
            found = mask_layout(granularity, f"model.{name}", shape, storage)
            assert found.shape == tuple(map(int, entries.split())), (name, granularity)
            broadcast = torch.broadcast_shapes(found.expanded_shape, shape)
            assert broadcast == torch.Size(shape), (name, granularity)
        assert mask_layout("weight", name, shape, storage).shape == shape
        assert mask_layout("tensor", name, shape, storage).shape == (1,) * len(shape)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_whole_merges(family, family_recipe, tmp_path, granularity):
    rescale = "none" if granularity == "tensor" else "mean"
    found = tiny.merged(
        family_recipe(granularity=granularity, mask_rescale=rescale), tmp_path / "out"
    )
    masks = MaskSet.open(tmp_path / "out")
    base, math, code = (tiny.tensors_of(family / n) for n in ("base", "math", "code"))
    entries = 0
    for name, start in base.items():
        has_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        layout = mask_layout(granularity, name, tuple(start.shape), Storage(8), has_vocabulary)
        assert masks.layout(name) == layout
        assert masks.entries(name).shape == torch.Size(layout.shape)
        entries += masks.entries(name).numel()
        mask = masks.probabilities(name)
        assert tuple(mask.shape) == masks.shape(name)
        assert torch.equal(mask, layout.expand(masks.entries(name)))
        factor = mask / mask.mean() if rescale == "mean" else mask
        change = 0.5 * (math[name] - start) + 0.5 * (code[name] - start)
        torch.testing.assert_close(found[name], start + change * factor, rtol=1e-5, atol=1e-6)
    provenance = json.loads((tmp_path / "out/somf/somf.json").read_text())
    assert provenance["entries"] == entries
    assert max((masks.entries(name) - 0.5).abs().max() for name in base) > 0.02
    # The artifact is used again, and every command knows it.
    again = tiny.invoke("mergekit-yaml", tmp_path / "out.yml", tmp_path / "out")
    assert "reusing the mask" in again.output
    inspected = tiny.invoke("mergekit-somf", "inspect", tmp_path / "out")
    assert inspected.exit_code == 0
    assert f"{entries:,}" in inspected.output
    checked = tiny.invoke("mergekit-somf", "check", tmp_path / "out.yml")
    assert f"mask entries: {entries:,} at most" in " ".join(checked.output.split())


def test_a_heads_entry_is_drawn_once_for_the_whole_head(family_recipe, tmp_path):
    tiny.merged(family_recipe(granularity="head"), tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    drawn = masks.mask(QUERY, "sampled", seed=3)
    assert drawn.shape == (32, 1)
    assert torch.equal(drawn, drawn[::8].repeat_interleave(8, dim=0))
    assert drawn.unique().numel() == 4
    binary = masks.mask(OUTPUT, "binary")
    assert binary.shape == (1, 32)
    assert torch.equal(binary, (masks.probabilities(OUTPUT) > 0.5).float())


def test_granularity_may_differ_between_tensors(family_recipe, tmp_path):
    granularity = [{"filter": "mlp", "value": "row"}, {"filter": "norm", "value": "weight"}]
    tiny.merged(family_recipe(granularity=[*granularity, {"value": "column"}]), tmp_path / "out")
    masks = MaskSet.open(tmp_path / "out")
    assert masks.entries(UP).shape == (64, 1)
    assert masks.entries(NORM).shape == (32,)
    assert masks.entries(QUERY).shape == (1, 32)


def test_a_mask_of_one_entry_that_is_divided_by_its_mean_is_refused(family_recipe, tmp_path):
    message = tiny.refused(family_recipe(granularity="tensor"), tmp_path)
    assert "is always 1; set `mask_rescale: none`" in message


def test_granularity_that_a_reused_mask_does_not_have(family_recipe, tmp_path):
    learned = tiny.write_recipe(tmp_path / "learn.yml", family_recipe(granularity="row"))
    assert tiny.invoke("mergekit-somf", "learn", learned, tmp_path / "mask").exit_code == 0
    given = {"safety_dataset": None, "mask": str(tmp_path / "mask")}
    message = tiny.refused(family_recipe(**given, granularity="head"), tmp_path)
    assert "parameters.granularity: head does not fit the mask" in message
    assert "(32, 1)" in message
    assert tiny.merged(family_recipe(**given, granularity="row"), tmp_path / "same")
    assert tiny.merged(family_recipe(**given), tmp_path / "unsaid")
