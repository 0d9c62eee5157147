"""How tokenised data fit what reads them: lengths, rows of the embeddings, positions."""

import math
import re
from collections.abc import Sequence

from ..common.model_classes import model_class
from ..data.encoding import EncodedPair
from .headers import planned_tensors
from .plan import PlannedMerge

# More examples than this share that are cut are worth a larger max_length.
_CUT_SHARE = 0.05
_LEARNED_POSITIONS = re.compile(
    r"(?:^|\.)(?:wpe|embed_positions|position_embeddings?|positions_embed)\.weight$"
)
# Tokens that are named.
_NAMED = 5


def cut_counts(examples: Sequence[EncodedPair]) -> dict[str, int]:
    """Return how many prompts and answers were cut, as JSON.

    ``enough`` is the ``max_length`` under which fewer than 5 % of the examples would be.
    """
    if not examples:
        return {"prompts": 0, "answers": 0, "enough": 0}
    lengths = sorted(example.cut.whole for example in examples)
    may_be_longer = math.ceil(_CUT_SHARE * len(lengths)) - 1
    return {
        "prompts": sum(example.cut.prompt for example in examples),
        "answers": sum(example.cut.answers for example in examples),
        "enough": lengths[len(lengths) - 1 - may_be_longer],
    }


def cut_line(examples: Sequence[EncodedPair], max_length: int) -> str:
    """Return in words how many prompts and answers were cut, empty where none was."""
    counts = cut_counts(examples)
    if not counts["prompts"] and not counts["answers"]:
        return ""
    answers = sum(map(len, map(_answers, examples)))
    line = (
        f"{counts['prompts']:,} of {len(examples):,} prompts and {counts['answers']:,} of "
        f"{answers:,} answers were cut to max_length {max_length}"
    )
    if counts["enough"] > max_length:
        line += f"; max_length: {counts['enough']} would cut less than 5 % of the examples"
    return line


def template_notes(examples: Sequence[EncodedPair], data: str) -> list[str]:
    """Return what of the data the chat template has no place for, a sentence each.

    Args:
        examples: tokenised data.
        data: what the dataset is called, such as "safety dataset".
    """
    moved = sum(example.cut.system for example in examples)
    thoughts = sum(example.cut.thoughts for example in examples)
    notes = []
    if moved:
        notes.append(
            f"system messages of the {data} put before the first user message, since the chat "
            f"template has no place for them: {moved:,}"
        )
    if thoughts:
        notes.append(f"thoughts before answers of the {data} left out: {thoughts:,}")
    return notes


def fit_problems(planned: PlannedMerge, examples: Sequence[EncodedPair]) -> list[str]:
    """Return what the model that learns can't read of its data, a sentence each.

    Args:
        planned: the merge.
        examples: tokenised data.
    """
    return [*_tokens_without_row(planned, examples), *_places_without_row(planned, examples)]


def _tokens_without_row(planned: PlannedMerge, examples: Sequence[EncodedPair]) -> list[str]:
    if planned.tokenizer_info is not None:
        # mergekit gives the embeddings a row for each token.
        return []
    shapes = planned_tensors(planned)
    rows = [
        shapes[weight.name].shape[weight.vocabulary_axis]
        for weight, _ in planned.tensors
        if weight.vocabulary_axis is not None and weight.name in shapes
    ]
    count = min(rows, default=planned.out_config.get_text_config().vocab_size)
    used = {
        token
        for example in examples
        for part in (example.prompt, *_answers(example))
        for token in part
    }
    beyond = sorted(token for token in used if token >= count)
    if not beyond:
        return []
    names = [f"{planned.tokenizer.convert_ids_to_tokens(token)} ({token})" for token in beyond]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [
        f"base_model: the embeddings of {planned.base_model} have {count:,} rows, and its "
        f"tokenizer gives the data tokens beyond them: {', '.join(names[:_NAMED])}{more}. Add "
        "`tokenizer: {source: base}` to the recipe, which gives each token a row, or name a "
        "tokenizer that fits the base"
    ]


def _places_without_row(planned: PlannedMerge, examples: Sequence[EncodedPair]) -> list[str]:
    own = model_class(planned.base_model, planned.options.trust_remote_code)
    tables = [
        tensor.shape[0]
        for name, tensor in planned_tensors(planned).items()
        if _LEARNED_POSITIONS.search(name) and own.is_text(name)
    ]
    if not tables:
        return []
    # OPT has two rows more than it can use.
    known = getattr(planned.out_config.get_text_config(), "max_position_embeddings", tables[0])
    most: int = min(*tables, known)
    longest = max(map(_length, examples), default=0)
    if longest <= most:
        return []
    return [
        f"parameters.max_length: the data have examples of {longest:,} tokens, and the base has "
        f"embeddings for {most:,} positions: set max_length to {most} or less"
    ]


def _length(example: EncodedPair) -> int:
    return len(example.prompt) + max(map(len, _answers(example)))


def _answers(example: EncodedPair) -> list[list[int]]:
    return [answer for answer in (example.chosen, example.rejected) if answer]
