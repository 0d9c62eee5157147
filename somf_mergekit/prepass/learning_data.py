"""What a merge's mask is learned from: models that fit each other, data that is usable."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date as day
from typing import Any

from mergekit.common import ModelReference

from ..common.errors import noted, raise_together
from ..data.chat import AS_GIVEN, Message
from ..data.conversations import known_rows
from ..data.encoding import EncodedPair, encoded_pairs
from ..data.held_out import LEAST, MOST, held_out_halves, held_out_split
from ..data.pairs import (
    Pair,
    answered_prompts,
    has_answers,
    pairs_of_answers,
    preference_pairs,
    read_answers,
)
from ..data.rendering import Rendering, writes_date
from ..data.rows import Examples
from ..recipe.settings import METHOD_NAME, NEVER, Settings
from .data_fit import cut_counts, cut_line, fit_problems, template_notes
from .given_masks import Given, GivenMask, given_masks
from .headers import checkpoint_problems
from .plan import PlannedMerge
from .plan_check import learning_problem
from .task_vectors import unchanged_models

CANT_BE_MADE = "This merge can't be made"


@dataclass(frozen=True)
class SafetyData:
    """Tokenised data of a recipe.

    Attributes:
        pairs: to learn from, in the order of the first epoch.
        held_out: not learned from; the merge is compared with the plain fusion on them.
        why_none: why no pairs are held out, in words; empty where some are.
        dropped: rows of the safety data left out and why, in words; empty where none was.
        utility: harmless prompts with answers, in the order of the first epoch.
        date: that the chat template wrote as today's, as 2026-11-30; None where it writes none.
        notes: what of the data isn't used, rows and columns, a sentence each.
        validation: not learned from either; they choose the mask where there is a ``patience``.
    """

    pairs: list[EncodedPair]
    held_out: list[EncodedPair]
    why_none: str
    dropped: str
    utility: list[EncodedPair]
    date: str | None = None
    notes: list[str] = field(default_factory=list)
    validation: list[EncodedPair] = field(default_factory=list)

    @property
    def all_pairs(self) -> list[EncodedPair]:
        """All of the safety data, learned from or not."""
        return [*self.pairs, *self.validation, *self.held_out]

    @property
    def cut(self) -> dict[str, int]:
        """How many prompts and answers of the safety data were cut; see ``data_fit.cut_counts``."""
        return cut_counts(self.all_pairs)

    def cut_text(self, max_length: int) -> str:
        """Return in words what of all data was cut to ``max_length``, empty where nothing was."""
        parts = (
            ("", cut_line(self.all_pairs, max_length)),
            ("utility data: ", cut_line(self.utility, max_length)),
        )
        return "; ".join(name + line for name, line in parts if line)


@dataclass(frozen=True)
class MaskInputs:
    """What a merge's masks are learned from, and those that it was given.

    Attributes:
        data: None where nothing is learned.
        given: by model.
    """

    data: SafetyData | None
    given: Given


def merge_inputs(
    planned: PlannedMerge, problems: Sequence[str] = (), date: str | None = None
) -> MaskInputs | None:
    """Return what a merge needs beside its plan, after checking it and the models together.

    None where its method takes no masks.

    Args:
        planned: the merge.
        problems: what is known to be wrong already, reported with the rest.
        date: see ``checked_data``.

    Raises:
        RecipeError: everything that is wrong, together; or what learning needs is not installed.
    """
    if planned.config.merge_method != METHOD_NAME:
        raise_together([*problems, *_model_problems(planned)], CANT_BE_MADE)
        return None
    found, given = list(problems), dict[ModelReference, GivenMask]()
    with noted(found):
        given = given_masks(planned, found)
    if planned.learners:
        return MaskInputs(checked_data(planned, found, date), given)
    raise_together([*found, *_model_problems(planned)], CANT_BE_MADE)
    return MaskInputs(None, given)


def checked_data(
    planned: PlannedMerge, problems: Sequence[str] = (), date: str | None = None
) -> SafetyData:
    """Return the safety data after checking it and the models against each other.

    Args:
        planned: the merge.
        problems: what is known to be wrong already, reported with the rest.
        date: that a chat template writes as today's, as 2026-11-30; the clock's where None.

    Raises:
        RecipeError: ``problems`` and everything else that is wrong, together; or what learning
            needs is not installed.
    """
    found = list(problems)
    data = SafetyData([], [], "", "", [])
    utility: list[EncodedPair] = []
    notes: list[str] = []
    found += _model_problems(planned)
    impossible = learning_problem(planned)
    found += [impossible] if impossible else []
    with noted(found):
        is_dated = writes_date(planned.tokenizer)
        date = (date or day.today().isoformat()) if is_dated else None
        how = Rendering(planned.settings.template_keywords, date)
        with noted(found):
            data = _safety_data(planned, how)
        with noted(found, "parameters.utility_dataset: "):
            utility, notes = _utility_data(planned, how)
        found += fit_problems(planned, [*data.all_pairs, *utility])
    raise_together(found, CANT_BE_MADE)
    return replace(data, utility=utility, date=date, notes=data.notes + notes)


def _model_problems(planned: PlannedMerge) -> list[str]:
    """Return what is wrong with the models of a merge beside each other, a sentence each."""
    problems: list[str] = []
    with noted(problems):
        problems += checkpoint_problems(planned)
    if not problems:
        problems += [
            f"{model} changes nothing, all of its task vectors are zero: each tensor is that of "
            f"base_model {planned.base_model}. "
            + ("Was the adapter trained, and on this base?" if model.lora else "Leave it out.")
            for model in unchanged_models(planned)
        ]
    return problems


def _safety_data(planned: PlannedMerge, how: Rendering) -> SafetyData:
    settings = planned.settings
    source = settings.safety_dataset or ""
    rows = known_rows(source, settings.safety_split, settings.safety_config)
    columns = rows.column_names
    if settings.objective == "sft" and "rejected" not in columns and has_answers(columns):
        return _safe_answers(planned, answered_prompts(rows, source), source, how)
    pairs = preference_pairs(rows, source)
    return preference_data(pairs, source, planned.tokenizer, settings, how)


def preference_data(
    pairs: Examples[Pair],
    source: str,
    tokenizer: Any,
    settings: Settings,
    how: Rendering = AS_GIVEN,
) -> SafetyData:
    """Return what a mask learns from of a dataset of preference pairs, and what is held out.

    No more pairs are tokenised than the steps take and the held-out ones are drawn from.

    Raises:
        RecipeError: no pair is usable after tokenisation, or too few are held out for ``patience``.
    """
    share, enough = settings.held_out_share, _used(settings)
    if enough is not None and share:
        enough += math.ceil(MOST / share)
    taken: list[Pair] = []

    def noted(found: Iterable[Pair]) -> Iterator[Pair]:
        for pair in found:
            taken.append(pair)
            yield pair

    chosen = noted(pairs.sampled(settings.safety_samples, settings.seed))
    encoded, cut = encoded_pairs(chosen, tokenizer, settings.max_length, source, enough, how)
    learned, held_out = held_out_split(encoded, taken, share)
    why_none = ""
    if not held_out:
        few = f"{share:g} of {len(encoded):,} pairs with whole prompts is fewer than {LEAST}"
        why_none = few if share else "held_out_share is 0"
    validation: list[EncodedPair] = []
    if settings.patience != NEVER:
        validation, held_out = held_out_halves(held_out, taken, why_none)
    dropped = ", ".join(filter(None, (str(pairs.left_out), str(cut))))
    notes = pairs.notes("safety dataset", dropped)
    notes += template_notes(encoded, "safety dataset")
    return SafetyData(learned, held_out, why_none, dropped, [], notes=notes, validation=validation)


def _used(settings: Settings) -> int | None:
    """Return how many examples the steps take at most, None for all of them."""
    steps = settings.max_steps
    return None if steps is None else max(1, steps) * settings.batch_size


def _safe_answers(
    planned: PlannedMerge, found: Examples[tuple[list[Message], str]], source: str, how: Rendering
) -> SafetyData:
    pairs, dropped = _answers(planned, found, source, planned.settings.safety_samples, how)
    why_none, notes = "the data has no unsafe answers", found.notes("safety dataset", dropped)
    if planned.settings.patience != NEVER:
        held_out_halves([], [], why_none)
    notes += template_notes(pairs, "safety dataset")
    return SafetyData(pairs, [], why_none, dropped, [], notes=notes)


def _utility_data(planned: PlannedMerge, how: Rendering) -> tuple[list[EncodedPair], list[str]]:
    """Return the utility data, and what of it isn't used, a sentence each."""
    settings = planned.settings
    source = settings.utility_dataset
    if not source:
        return [], []
    found = read_answers(source, settings.utility_split, settings.utility_config)
    encoded, dropped = _answers(planned, found, source, settings.utility_samples, how)
    notes = found.notes("utility dataset", dropped)
    return encoded, notes + template_notes(encoded, "utility dataset")


def _answers(
    planned: PlannedMerge,
    found: Examples[tuple[list[Message], str]],
    source: str,
    count: int | None,
    how: Rendering,
) -> tuple[list[EncodedPair], str]:
    """Return ``count`` prompts with answers (all for None) in an order drawn from the seed.

    Beside them stands in words how many rows were left out, empty where none was.
    """
    settings = planned.settings
    chosen = found.sampled(count, settings.seed)
    tokenizer, most = planned.tokenizer, settings.max_length
    pairs = pairs_of_answers(chosen)
    encoded, cut = encoded_pairs(pairs, tokenizer, most, source, _used(settings), how)
    return encoded, ", ".join(filter(None, (str(found.left_out), str(cut))))
