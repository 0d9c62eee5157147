"""From what was computed to measures: per example a numerator and a denominator."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.pairs import Pair
from .coherence import N_GRAM
from .extract import extractor
from .judges import REFUSES, SAFE, Verdicts
from .likelihood import AnswerScores
from .refusals import is_refusal
from .sets import HARMFUL, PAIRS, Skill

SHARE, NUMBER = "share", "number"
# Of a model to each prompt of a set; None where it never left its thought.
Answers = Sequence[str | None]


@dataclass(frozen=True)
class Ratio:
    """One measure of one model: sum(totals) / sum(weights), an entry per example.

    An example that says nothing of the measure has weight 0.
    """

    totals: list[float]
    weights: list[float]


@dataclass
class Measure:
    """One row of the table.

    Attributes:
        set: what it is measured on.
        name: of the measure.
        unit: ``share`` (0 to 1) or ``number``.
        exponential: whether the measure is exp of its ratio (a perplexity).
        groups: which examples belong together in the bootstrap.
        models: by model name; a model is missing where the measure can't be taken.
    """

    set: str
    name: str
    unit: str
    exponential: bool = False
    groups: Sequence[Hashable] = ()
    models: dict[str, Ratio] = field(default_factory=dict)


class Measures:
    """Collects the measures, in the order in which they come up."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Measure] = {}

    def add(
        self,
        place: tuple[str, str],
        model: str,
        totals: Iterable[float | None],
        weights: Iterable[float] | None = None,
        *,
        unit: str = SHARE,
        exponential: bool = False,
        groups: Sequence[Hashable] = (),
    ) -> None:
        """Add a measure of one model; examples whose total is None say nothing."""
        values = list(totals)
        given = [1.0] * len(values) if weights is None else list(map(float, weights))
        known = [0.0 if v is None else w for v, w in zip(values, given, strict=True)]
        row = self.rows.setdefault(
            place,
            Measure(*place, unit, exponential, groups or range(len(values))),
        )
        row.models[model] = Ratio([float(value or 0) for value in values], known)

    def add_unfinished(self, name: str, model: str, answers: Answers) -> None:
        """Add how many answers never leave their thought: they neither refuse nor answer."""
        self.add((name, "unfinished thoughts"), model, [answer is None for answer in answers])

    def add_refusals(
        self, name: str, model: str, answers: Answers, judge: str, verdicts: Verdicts | None
    ) -> None:
        """Add the refusal rate by the phrases, and by the judge where there is one."""
        by_phrases = [None if answer is None else is_refusal(answer) for answer in answers]
        self.add((name, "refusals (phrases)"), model, by_phrases)
        if verdicts is None:
            return
        refuses, safe = verdicts[REFUSES], verdicts[SAFE]
        tells_refusals = any(verdict is not None for verdict in refuses)
        if tells_refusals:
            self.add((name, f"refusals ({judge})"), model, refuses)
        # That a helpful answer to a harmless prompt is safe says nothing.
        tells_safety = name == HARMFUL and any(verdict is not None for verdict in safe)
        if tells_safety:
            self.add((name, f"safe ({judge})"), model, safe)
        compared = refuses if tells_refusals else safe if tells_safety else None
        if compared is not None:
            differ = [
                None if verdict is None else verdict != phrase
                for verdict, phrase in zip(compared, by_phrases, strict=True)
            ]
            self.add((name, f"phrases and {judge} disagree"), model, differ)

    def add_coherence(
        self, name: str, model: str, answers: Answers, base: str, found: dict[str, list[Any]]
    ) -> None:
        """Add how coherent generated answers are."""
        repeated = [
            None if answer is None else share
            for answer, share in zip(answers, found["repeated"], strict=True)
        ]
        self.add((name, f"repeated {N_GRAM}-grams"), model, repeated)
        empty = [None if answer is None else not answer for answer in answers]
        self.add((name, "empty answers"), model, empty)
        self.add(
            (name, f"perplexity under {base}"),
            model,
            [-value for value in found["log_probs"]],
            found["tokens"],
            unit=NUMBER,
            exponential=True,
        )

    def add_pairs(self, model: str, pairs: Sequence[Pair], margins: list[float | None]) -> None:
        """Add preference accuracy and margin; pairs of one prompt belong together."""
        groups = [pair.prompt for pair in pairs]
        right = [None if margin is None else margin > 0 for margin in margins]
        self.add((PAIRS, "preference accuracy"), model, right, groups=groups)
        self.add((PAIRS, "preference margin"), model, margins, unit=NUMBER, groups=groups)

    def add_scores(self, skill: Skill, model: str, scores: AnswerScores) -> None:
        """Add loss and token accuracy on right answers."""
        losses = [-value for value in scores.log_probs]
        self.add((skill.name, "loss"), model, losses, scores.tokens, unit=NUMBER)
        self.add((skill.name, "token accuracy"), model, scores.hits, scores.tokens)

    def add_exact(self, skill: Skill, model: str, answers: Answers) -> None:
        """Add the exact match of what is extracted; right answers that hold none are left out."""
        extracted = extractor(skill.extract or "")
        expected = [extracted(answer) for _, answer in skill.examples]
        match = [
            None if right is None else answer is not None and extracted(answer) == right
            for right, answer in zip(expected, answers, strict=True)
        ]
        self.add((skill.name, f"exact match ({skill.extract})"), model, match)

    def add_distance(
        self, skill: Skill, model: str, reference: str, found: tuple[list[float], list[int]]
    ) -> None:
        """Add the mean KL per answer token."""
        self.add((skill.name, f"KL from {reference}"), model, *found, unit=NUMBER)
