"""A frozen base in 4 or 8 bits a weight, by bitsandbytes: linear layers that only pass on."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Parameter

from ..common.errors import first_line
from ..common.machine import EIGHT_BITS, FACTORED, FOUR_BITS, MachineOptions
from ..common.model_classes import text_names

_LOG_OF_CASTS = "bitsandbytes.autograd._functions"
# With their scales: one of 8 bits for 64 weights, and one of 32 for a row.
_BYTES = {FOUR_BITS: 0.52, EIGHT_BITS: 1.01}


@dataclass(frozen=True)
class FewBits:
    """Which weights of a model are in few bits.

    Attributes:
        precision: ``4bit`` (NF4 with scales of 8 bits, arXiv 2305.14314) or ``8bit`` (a scale a
            row, arXiv 2208.07339).
        weights: their names.
    """

    precision: str
    weights: frozenset[str]

    @property
    def bytes_each(self) -> float:
        """How many bytes an entry of them takes, with its share of the scales."""
        return _BYTES[self.precision]


def precision_text(precision: str) -> str:
    """Return a precision in words, as ``4 bits``."""
    return f"{precision.removesuffix('bit')} bits"


def weights_for_few_bits(model: Any) -> set[str]:
    """Return the names of the weights of a model that can be: those of plain linear layers.

    The output head's isn't among them, as elsewhere: its errors go straight into the
    probabilities.

    Args:
        model: of transformers, on any device.
    """
    text, head = text_names(model), model.get_output_embeddings()
    layers = [name for name, m in model.named_modules() if type(m) is Linear and m is not head]
    return text & {f"{name}.weight" for name in layers}


def take_away(model: Any, weights: Collection[str]) -> None:
    """Take the memory of weights of linear layers away; their shapes and types stay."""
    for name in weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight = Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)


def in_few_bits(
    layer: Linear, weight: Tensor, precision: str, device: torch.device | str
) -> Linear:
    """Return a layer that computes as ``layer`` does, with a weight in few bits.

    Args:
        layer: with the bias, and the type that its weight had, in which it is computed with.
        weight: (out, in), of any type on any device.
        precision: see ``FewBits``.
        device: where the layer computes.
    """
    import bitsandbytes

    shape, kind = (layer.in_features, layer.out_features), layer.weight.dtype
    own = weight.to("cpu", kind)
    if precision == FOUR_BITS:
        made = bitsandbytes.nn.Linear4bit(
            *shape, bias=False, compute_dtype=kind, quant_type="nf4", device="meta"
        )
        made.weight = bitsandbytes.nn.Params4bit(own, quant_type="nf4", module=made)
    else:
        # Each call says that it rounds, which is what was asked for.
        logging.getLogger(_LOG_OF_CASTS).setLevel(logging.ERROR)
        made = bitsandbytes.nn.Linear8bitLt(
            *shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        made.weight = bitsandbytes.nn.Int8Params(own, requires_grad=False)
    made.weight = made.weight.to(device)
    made.bias = layer.bias
    # On some CPUs a layer that doesn't train is packed in a way that no gradient goes through.
    return made.train()


def few_bits_problem(machine: MachineOptions, device: str) -> str | None:
    """Return what keeps a base from being in few bits where it should be; None for nothing.

    Args:
        machine: its options.
        device: where the model would learn.
    """
    precision = machine.base_precision
    if precision is None:
        return None
    option = f"--base-precision {precision} (SOMF_BASE_PRECISION)"
    if machine.engine not in (None, FACTORED):
        return (
            f"{option} is for the factored engine, and --engine {machine.engine} was asked for: "
            "leave one of them out"
        )
    try:
        layer = in_few_bits(Linear(64, 64, bias=False), torch.zeros(64, 64), precision, device)
        layer(torch.ones(1, 64, device=device))
    except ImportError as error:
        return (
            f"{option} needs the package bitsandbytes ({first_line(error)}): "
            "pip install 'somf-mergekit[few-bits]'"
        )
    except Exception as error:  # as many as there are devices
        return f"{option}: bitsandbytes can't do this on the device {device!r}: {first_line(error)}"
    return None
