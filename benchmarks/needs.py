"""What learning a mask needs for models of known shapes, as the forecast of the package says."""

from typing import Any

import click

import somf_mergekit
from somf_mergekit.mask.granularity import GRANULARITIES
from somf_mergekit.recipe.settings import Settings

# Public shapes; no weights are loaded.
SHAPES = {
    "1.1 B (TinyLlama)": (2048, 5632, 22, 32, 4, 32_000, False),
    "3 B (Llama 3.2)": (3072, 8192, 28, 24, 8, 128_256, True),
    "8 B (Llama 3.1)": (4096, 14_336, 32, 32, 8, 128_256, False),
    "14 B (Qwen 2.5)": (5120, 13_824, 48, 40, 8, 152_064, False),
    "70 B (Llama 3.1)": (8192, 28_672, 80, 64, 8, 128_256, False),
}
_GIB = 1 << 30


@click.command()
@click.option("--batch-size", default=16, show_default=True, help="Pairs a step.")
@click.option("--micro-batch", default=4, show_default=True, help="Pairs at once.")
@click.option("--max-length", default=128, show_default=True)
@click.option(
    "--granularity",
    type=click.Choice(GRANULARITIES),
    default=Settings.model_fields["granularity"].default,
    show_default=True,
)
def main(batch_size: int, micro_batch: int, max_length: int, granularity: str) -> None:
    """Print the table: bfloat16, a linear fusion of any number of models."""
    somf_mergekit.register()
    from somf_mergekit.common.machine import RESIDENT, STREAMING
    from somf_mergekit.prepass.forecast import Need, engine_needs

    click.echo(
        "| model | resident, memory | streaming on CPU, memory | and disk "
        "| streaming on GPU, its memory | and the host's |"
    )
    click.echo("|---|---|---|---|---|---|")
    for label, shape in SHAPES.items():
        config, tensors = _model(shape, granularity)
        on_cpu, on_gpu = (
            engine_needs(
                config,
                tensors,
                computed=2,
                step_tokens=2 * max_length * batch_size,
                pair_tokens=2 * max_length,
                on_cpu=is_cpu,
            )
            for is_cpu in (True, False)
        )

        def memory(need: Need) -> str:
            return f"{(need.held + micro_batch * need.pair) / _GIB:.1f} GiB"

        streaming, streaming_on_gpu = on_cpu[STREAMING], on_gpu[STREAMING]
        click.echo(
            f"| {label} | {memory(on_cpu[RESIDENT])} | {memory(streaming)} "
            f"| {streaming.disk / _GIB:.0f} GiB | {memory(streaming_on_gpu)} "
            f"| {streaming_on_gpu.host / _GIB:.0f} GiB |"
        )


def _model(
    shape: tuple[int, int, int, int, int, int, bool], granularity: str
) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from somf_mergekit.prepass.headers import PlannedTensor

    hidden, inner, layers, heads, groups, vocabulary, tied = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {
        name: PlannedTensor(
            may_get_mask=True,
            mask_name=name,
            shape=tuple(weight.shape),
            has_vocabulary="embed" in name,
            granularity=granularity,
            delta_tensors=1,
            itemsize=2,
        )
        for name, weight in model.named_parameters()
    }
    return config, tensors


if __name__ == "__main__":
    main()
