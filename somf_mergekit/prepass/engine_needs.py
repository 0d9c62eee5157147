"""What each engine needs to learn a recipe's masks, in bytes: read off headers."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..common.machine import FACTORED, RESIDENT, SHARDED, STREAMING
from .factored_tensors import Changes
from .headers import PlannedTensor
from .plan import PlannedMerge

LOGIT_BYTES = 4
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Need:
    """What an engine needs in each process, in bytes.

    Attributes:
        held: in memory throughout.
        pair: for the activations of each pair that goes through the model at once.
        disk: in files while learning.
        host: in the host's memory, where the rest is on a GPU.
        pair_recomputed: ``pair`` where a backward pass computes each layer again; None where the
            engine doesn't.
    """

    held: int
    pair: int
    disk: int = 0
    host: int = 0
    pair_recomputed: int | None = None

    @property
    def least(self) -> int:
        """Memory with one pair at once."""
        return self.held + (self.pair if self.pair_recomputed is None else self.pair_recomputed)


def engine_needs(
    planned: PlannedMerge,
    tensors: Mapping[str, PlannedTensor],
    entries: Mapping[str, int],
    changes: Changes | None,
    in_few_bits: Mapping[str, float],
    computed: int,
    processes: int,
    on_cpu: bool,
) -> dict[str, Need]:
    """Return what each engine needs, the fastest one first.

    Args:
        planned: the recipe.
        tensors: of the merge, by name.
        entries: of the masks of those that may get one.
        changes: of adapters, where they can stay factored.
        in_few_bits: bytes of an entry of the base's tensors that are in few bits then.
        computed: bytes of a number in the type the model computes in.
        processes: how many learn together.
        on_cpu: whether the model learns there, not on a GPU.
    """
    settings, text = planned.settings, planned.out_config.get_text_config()
    # Beside a logit, AdamW holds two numbers.
    has_moments = settings.optimizer == "adamw"
    resident = factored = outside = stores = shards = visitor = 0
    layers: Counter[str] = Counter()
    brought: Counter[str] = Counter()
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape)
        # Embeddings stay float32 under autocast.
        in_model = size * (4 if tensor.has_vocabulary else computed)
        held = size * tensor.itemsize
        # While it is read, the base is in the host's memory as it is stored.
        factored += int(size * in_few_bits[name]) if name in in_few_bits else in_model
        factored += held if on_cpu else 0
        for change in (changes or {}).get(name, {}).values():
            # Both matrices, what they are under the mask, and the gradient of that.
            factored += 3 * LOGIT_BYTES * sum(matrix.numel() for matrix in change)
        linear = tensor.delta_tensors == tensor.masks
        if name in entries:
            in_model *= 2  # with the gradient
            held += size * tensor.delta_tensors * (computed if linear else tensor.itemsize)
            logits = LOGIT_BYTES * entries[name] * (3 if has_moments else 1)
            held += logits
            factored += logits
            if has_moments and not linear:
                # The gradient and slope of each entry, until the norm of the whole is known.
                resident += 2 * LOGIT_BYTES * entries[name]
        resident += in_model + held
        stores += held
        shards += held // processes if linear else held
        layer = _LAYER.match(name)
        if layer:
            layers[layer[1]] += in_model
            brought[layer[1]] += held
        else:
            outside += in_model
            visitor = max(visitor, held)
    pair_tokens = 2 * settings.max_length
    # Between layers the hidden states of a process' share of a step are stored, in float32.
    states = 4 * pair_tokens * settings.batch_size * text.hidden_size * text.num_hidden_layers
    by_layer = outside + max(layers.values(), default=0) + states // processes
    # Of each token, a backward pass keeps about twelve vectors of the model's width and four of the
    # feed-forward's in each layer, in float32.
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    pair_in_layer = pair_tokens * 4 * (12 * text.hidden_size + 4 * inner)
    if on_cpu:
        streaming = Need(by_layer, pair_in_layer, disk=stores)
    else:
        # Two layers, and one tensor outside of layers, are on the GPU with what they are made of.
        on_gpu = by_layer + 2 * max(brought.values(), default=0) + visitor
        streaming = Need(on_gpu, pair_in_layer, host=stores)
    return {
        FACTORED: Need(
            factored,
            pair_in_layer * text.num_hidden_layers,
            pair_recomputed=pair_in_layer + states // settings.batch_size,
        ),
        RESIDENT: Need(resident, pair_in_layer * text.num_hidden_layers),
        SHARDED: Need(by_layer + shards, pair_in_layer),
        STREAMING: streaming,
    }
