"""The gradient of a row mask by the weight's gradient, as the engines take it, or by activations.

``python -m benchmarks.gradient_ways`` times both on single layers, interleaved. With W the merged
weight, D the task vectors' sum and g the loss's gradient at the layer's output, the factor of row r
gets sum((g^T y) * D, columns)[r] or, without a weight gradient, sum(g * (y D^T), tokens)[r].
"""

import time
from collections.abc import Callable
from statistics import median

import click
import torch
from torch import Tensor
from torch.nn.functional import linear

from somf_mergekit.common.console import aligned_table

# (out, in) of a model's layers, and how many of each it has.
LAYERS = {
    "SmolLM2-135M": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
    "TinyLlama-1.1B": {(2048, 2048): 2, (256, 2048): 2, (5632, 2048): 2, (2048, 5632): 1},
}
TOKENS = (128, 1024, 4096)


def by_weight_gradient(g: Tensor, y: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """Return the factor's gradient, (out,); and go on backwards to the layer's input."""
    g @ weight
    return ((g.T @ y) * change).sum(1)


def by_activations(g: Tensor, y: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """Return the same."""
    g @ weight
    return (g * linear(y, change)).sum(0)


@click.command()
@click.option("--repeats", default=7, show_default=True, help="Median of these.")
def main(repeats: int) -> None:
    """Time both ways back through a layer of each shape, in float32 on one core."""
    torch.set_num_threads(1)
    ways: dict[str, Callable[..., Tensor]] = {
        "weight gradient": by_weight_gradient,
        "activations": by_activations,
    }
    rows = []
    for model, shapes in LAYERS.items():
        for tokens in TOKENS:
            seconds = dict.fromkeys(ways, 0.0)
            for (out, inputs), count in shapes.items():
                draw = torch.Generator().manual_seed(0)
                sizes = ((tokens, out), (tokens, inputs), (out, inputs), (out, inputs))
                tensors = [torch.randn(size, generator=draw) for size in sizes]
                one, other = (way(*tensors) for way in ways.values())
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
                found: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(repeats):
                    for name, way in ways.items():
                        start = time.perf_counter()
                        way(*tensors)
                        found[name].append(time.perf_counter() - start)
                for name in ways:
                    seconds[name] += count * median(found[name])
            ratio = seconds["activations"] / seconds["weight gradient"]
            rows.append([model, str(tokens), f"{ratio:.2f}"])
    click.echo(aligned_table([["a layer of", "tokens", "activations / weight gradient"], *rows]))


if __name__ == "__main__":
    main()
