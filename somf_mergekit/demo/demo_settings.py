"""How large the demo is: sizes, steps and rates, found by measurement to fit into minutes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage of training: optimiser steps and the peak learning rate."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class DemoSettings:
    """The demo's dials.

    Attributes:
        hidden_size, layers, heads: the model's shape.
        pretraining: everyday and forbidden questions are all answered; skills are seen in part.
        alignment: forbidden questions are refused. Short and shallow, as it is found in the
            field: the answers stay in the weights, beneath the refusal.
        specialisation: a skill and some everyday questions, all harmless.
        batch_size: examples in a step of training.
        numbers_seen, code_seen: how many examples of each skill the base sees.
        everyday_kept: how many everyday questions a specialist sees beside its skill.
        weight: the weight of each task vector in the merges.
        harmful_pairs, harmless_pairs: the safety pairs to learn the mask from.
        mask: the optimiser steps and the learning rate of the mask.
        mask_batch_size: pairs in a step of the mask.
        mask_sft_weight: of the safe answers' likelihood beside DPO. Without it the preference of
            so small a model is won at the expense of its wording.
        train, held_out: the most examples in a split.
        max_length: tokens of a question with its answer, at most.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    pretraining: Stage = field(default=Stage(600, 2e-3))
    alignment: Stage = field(default=Stage(80, 5e-4))
    specialisation: Stage = field(default=Stage(250, 7e-4))
    batch_size: int = 32
    numbers_seen: int = 600
    code_seen: int = 100
    everyday_kept: int = 200
    weight: float = 0.7
    harmful_pairs: int = 640
    harmless_pairs: int = 960
    mask: Stage = field(default=Stage(90, 0.05))
    mask_batch_size: int = 16
    mask_sft_weight: float = 1.0
    train: int = 1200
    held_out: int = 96
    max_length: int = 64
