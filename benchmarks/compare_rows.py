"""The ways that are compared, each with the settings it is tuned over."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .compare_recipes import (
    GROUPS,
    MASK,
    PAIRS,
    REFERENCE_WEIGHT,
    UTILITY,
    Making,
    Recipe,
    recipe,
    reference_merge,
    repair,
)
from .compare_settings import (
    COLD,
    DARE,
    DEFAULTS,
    PUBLISHED,
    QUICKLY,
    REPAIR_SETTINGS,
    TASK_ARITHMETIC,
    TIES,
    named,
)

# Whose masks stand for the package in each comparison.
CHAMPION = {"two": "somf", "three": "somf_three"}
LINE = {"two": "task_arithmetic", "three": "task_arithmetic_three"}
# Parameters of the fusion, which learning and merging must both be told.
_FUSION_OWN = ("density", "normalize")


@dataclass(frozen=True)
class Learning:
    """How long a mask is learned, and DPO trained: the same pairs in the same order.

    Attributes:
        steps: of the defaults, and of their rival.
        fewer: of all others, which show what else matters in a quarter of the time.
        batch_size: pairs a step.
        max_length: tokens of a prompt with an answer.
    """

    steps: int = 240
    fewer: int = 60
    batch_size: int = 8
    max_length: int = 128


@dataclass(frozen=True)
class Row:
    """One way to merge.

    Attributes:
        name: of the row.
        label: in the table.
        group: a key of GROUPS; None for a model that is no merge.
        settings: what it is tuned over, by name; the same names for every seed.
        is_line: its settings are a sweep of the plain merge, the line to beat.
        tests_all: all settings are tested, not the chosen one alone.
        is_shared: seeds change nothing.
        is_single: measured on the first seed alone; what it shows is worth no more time.
        is_needed: its validation is needed, although there is nothing to choose.
    """

    name: str
    label: str
    group: str | None
    settings: dict[str, Making] = field(repr=False)
    is_line: bool = False
    tests_all: bool = False
    is_shared: bool = False
    is_single: bool = False
    is_needed: bool = False


def comparison_rows(seed: int, learning: Learning, quick: bool = False) -> dict[str, Row]:
    """Return all rows by name, in the order in which they are worked through.

    Args:
        seed: of masks, of the order of the pairs, and of every random draw.
        learning: how long.
        quick: two settings a row, to try the script.
    """
    rows = {row.name: row for row in _Rows(seed, learning).rows()}
    if not quick:
        return rows
    return {name: _shortened(row) for name, row in rows.items()}


def reference_setting(group: str) -> str:
    """Return the name of the plain merge among the settings of the group's weight sweep."""
    return f"weight {REFERENCE_WEIGHT[group]}"


def _shortened(row: Row) -> Row:
    names = list(row.settings)[:2]
    if row.is_line:
        names += [reference_setting(str(row.group))]
    return replace(row, settings={name: row.settings[name] for name in names})


class _Rows:
    def __init__(self, seed: int, learning: Learning):
        self.seed = seed
        self.learning = learning

    def rows(self) -> Iterator[Row]:
        """Yield the rows, the most telling ones first."""
        yield _prepared("aligned", "aligned base", is_shared=True, is_needed=True)
        yield _prepared("math", "math specialist")
        yield _prepared("code", "code specialist")
        yield self._line("two", (0.3, 0.4, 0.5, 0.6))
        fewer, default = self.learning.fewer, self._default
        yield Row("somf", "somf", "two", {"defaults": self._somf(**default)})
        # A quarter of the pairs that the defaults' steps take, and as many held out.
        few = {"epochs": 4, "safety_samples": 533}
        made = {named(few): self._somf(**default, **few)}
        yield Row("somf_few_pairs", "somf, 480 pairs", "two", made, is_single=True)
        # Less time for about as much movement of the logits.
        shorter = [
            {"max_steps": times * fewer, "learning_rate": rate}
            for times, rate in ((1, 0.1), (2, 0.05))
        ]
        made = {named(s): self._somf(**s) for s in shorter}
        yield Row("somf_fewer_steps", "somf, fewer steps", "two", made, tests_all=True)
        rates = ({"learning_rate": 0.03}, {"learning_rate": 0.3})
        settings = ({}, *rates, {"weight": 0.6})
        yield self._own("somf_dpo", None, settings)
        per_weight = {"granularity": "weight"}
        yield self._own("somf_weight", "one entry a weight", ({}, rates[0]), **per_weight)
        # The strongest rival: that a rule chose its rate would be too little to say of it.
        dpo = "safety DPO of the plain merge"
        yield Row("dpo", dpo, "two", self._dpo(), tests_all=True)
        norm = {"objective": "dpo_norm", "beta": DEFAULTS["beta"]}
        label = "length-normalized safety DPO of the plain merge"
        yield Row("dpo_norm", label, "two", self._dpo(**norm), tests_all=True)
        made = self._dpo(**norm, max_steps=self.learning.steps)
        yield Row("dpo_norm_longer", f"{label}, four times the steps", "two", made, tests_all=True)
        yield from self._repairs()
        yield self._untrained("sampled", "untrained_sampled", "task_arithmetic", TASK_ARITHMETIC)
        for fusion, grid in (("dare_linear", DARE), ("ties", TIES)):
            plain = {named(s): Making(merges=(self._plain(fusion, **s),)) for s in grid}
            yield Row(fusion, fusion, "two", plain)
        yield from self._variants(rates)
        yield from self._three()
        yield _prepared("published", "as published, before alignment", is_shared=True)
        # The published hyper-parameters, but for the length: they take many times as long.
        paper = recipe(
            "somf",
            GROUPS["two"],
            0.5,
            safety_dataset=PAIRS,
            preset="paper",
            granularity="weight",
            max_length=self.learning.max_length,
            seed=self.seed,
        )
        made = {
            setting: Making(
                learns=paper,
                merges=(self._masked("task_arithmetic", GROUPS["two"], mask_kind=kind),),
            )
            for setting, kind in (("soft as published", "sampled"), ("binary", "bernoulli"))
        }
        label = "somf, preset paper"
        yield Row("somf_paper", label, "two", made, is_single=True, tests_all=True)

    def _variants(self, rates: tuple[dict[str, Any], ...]) -> Iterator[Row]:
        """Yield what differs in one way from a mask that the published objective is learned by."""
        binary = {"mask_kind": "binary"}
        yield self._single("somf_binary", "binary mask", ({}, *rates), **binary)
        yield self._single(
            "somf_weight_binary",
            "one entry a weight, binary mask",
            ({}, rates[0]),
            granularity="weight",
            **binary,
        )
        # The published binary mask: the same masks as above, drawn and not thresholded.
        drawn = {"mask_kind": "bernoulli"}
        yield self._single("somf_bernoulli", "Bernoulli mask", ({}, *rates), **drawn)
        yield self._single(
            "somf_weight_bernoulli",
            "one entry a weight, Bernoulli mask",
            ({}, rates[0]),
            granularity="weight",
            **drawn,
        )
        # Starts at 0.95 of the plain merge, and can only take away.
        unscaled = {"mask_rescale": "none", "init_logit": 3.0}
        # Starts at the plain merge, a half of all changes, and learns how much of each is added.
        whole = {"weight": 1.0, "init_logit": 0.0}
        starts = ({}, whole)
        yield self._own("somf_no_rescale", "no rescale", starts, **unscaled)
        yield self._single(
            "somf_binary_no_rescale",
            "binary mask, no rescale",
            starts,
            **unscaled,
            **binary,
        )
        yield self._single("somf_base", "reference base", ({},), reference="base")
        yield self._single("somf_utility", "utility term", ({},), utility_dataset=UTILITY)
        longer = {"max_steps": self.learning.steps}
        yield self._single("somf_longer", "four times the steps", ({},), **longer)
        for name in ("head", "column", "tensor"):
            # Divided by its mean, a mask of one entry is 1.
            start = {**unscaled, **whole} if name == "tensor" else {}
            label = f"one entry a {name}"
            yield self._single(f"somf_{name}", label, ({},), granularity=name, **start)
        yield self._untrained("binary", "untrained_binary", "task_arithmetic", TASK_ARITHMETIC)
        for fusion, grid in (("dare_linear", DARE), ("ties", TIES)):
            for kind in ("sampled", "binary"):
                yield self._untrained(kind, f"untrained_{kind}_{fusion}", fusion, grid[:2])
            yield self._single(f"somf_{fusion}", fusion, grid[:1], fusion=fusion)

    def _line(self, group: str, weights: tuple[float, ...]) -> Row:
        models = GROUPS[group]
        made = {
            f"weight {w}": Making(merges=(recipe("task_arithmetic", models, w),)) for w in weights
        }
        name = LINE[group]
        label = "task_arithmetic" + " of three" * (group == "three")
        return Row(name, label, group, made, is_line=True, tests_all=True)

    def _own(
        self, name: str, change: str | None, settings: Iterable[dict[str, Any]], **fixed: Any
    ) -> Row:
        made = {named(s) or "defaults": self._somf(**{**PUBLISHED, **fixed, **s}) for s in settings}
        label = f"somf, DPO, {change}" if change else "somf, DPO"
        return Row(name, label, "two", made)

    def _single(
        self, name: str, change: str, settings: Iterable[dict[str, Any]], **fixed: Any
    ) -> Row:
        return replace(self._own(name, change, settings, **fixed), is_single=True)

    def _untrained(self, kind: str, name: str, fusion: str, grid: tuple[Recipe, ...]) -> Row:
        made = {named(s): self._undirected(kind, fusion, s) for s in grid}
        is_single = name != "untrained_sampled"
        return Row(name, f"untrained mask, {kind}, {fusion}", "two", made, is_single=is_single)

    def _undirected(self, kind: str, fusion: str, setting: Recipe, group: str = "two") -> Making:
        """A mask that nothing was learned for, drawn from the seed; without a draw it is 1."""
        drawn = {"mask_kind": "sampled", "temperature": COLD if kind == "binary" else 0.5}
        nothing = {**QUICKLY, "max_steps": 0, "seed": 0}
        learns = recipe("somf", GROUPS["two"], 0.5, safety_dataset=PAIRS, **nothing)
        merge = self._masked(fusion, GROUPS[group], **drawn, **setting)
        return Making(learns=learns, merges=(merge,))

    def _dpo(self, **changes: Any) -> dict[str, Making]:
        settings = ({"learning_rate": rate} for rate in (3e-6, 1e-5, 3e-5))
        merges = (reference_merge(),)
        fixed = {**self._pace, **changes}
        return {named(s): Making(merges=merges, dpo={**s, **fixed}) for s in settings}

    def _repairs(self) -> Iterator[Row]:
        for name, settings in REPAIR_SETTINGS.items():
            roles = {"unaligned": "@published"}
            if name == "safemerge":
                roles["safety_tuned"] = "@safe"
            made = {
                named(s): Making(
                    merges=(reference_merge(), repair(name, roles, s)),
                    trained=("safe",) if "safety_tuned" in roles else (),
                )
                for s in settings
            }
            yield Row(name, name, "two", made)

    def _three(self) -> Iterator[Row]:
        yield replace(_prepared("general", "general specialist"), is_single=True)
        yield replace(self._line("three", (0.2, 0.3, 0.4)), is_single=True)
        weights = ({"weight": 0.3}, {"weight": 0.4})
        three = GROUPS["three"]
        reused = {
            named(s): Making(
                learns=self._somf(**self._default).learns,
                merges=(self._masked("task_arithmetic", three, **s),),
                reuses=True,
            )
            for s in weights
        }
        made = {
            "somf_reused": ("somf, mask learned on two of three", reused),
            "somf_three": (
                "somf, mask learned on three",
                {named(s): self._somf(models=three, **self._default, **s) for s in weights[:1]},
            ),
            "untrained_three": (
                "untrained mask, sampled, three",
                {
                    named(s): self._undirected("sampled", "task_arithmetic", s, "three")
                    for s in weights
                },
            ),
        }
        for name, (label, settings) in made.items():
            yield Row(name, label, "three", settings, is_single=True)

    @property
    def _default(self) -> dict[str, Any]:
        return {**DEFAULTS, "max_steps": self.learning.steps}

    @property
    def _pace(self) -> dict[str, Any]:
        return {
            "max_steps": self.learning.fewer,
            "batch_size": self.learning.batch_size,
            "max_length": self.learning.max_length,
            "seed": self.seed,
        }

    def _somf(
        self,
        *,
        fusion: str = "task_arithmetic",
        models: tuple[str, ...] = GROUPS["two"],
        weight: float = 0.5,
        mask_kind: str = "soft",
        **changes: Any,
    ) -> Making:
        """Learn a mask quickly, by the defaults but for ``changes``, and merge with it."""
        own = {key: changes.pop(key) for key in _FUSION_OWN if key in changes}
        learned = {"safety_dataset": PAIRS, **QUICKLY, **self._pace, **changes}
        used = {key: changes[key] for key in ("mask_rescale",) if key in changes}
        return Making(
            learns=recipe("somf", models, weight, fusion=fusion, **own, **learned),
            merges=(
                self._masked(fusion, models, weight=weight, mask_kind=mask_kind, **own, **used),
            ),
        )

    def _masked(
        self, fusion: str, models: tuple[str, ...], *, weight: float = 0.5, **parameters: Any
    ) -> Recipe:
        return recipe(
            "somf", models, weight, fusion=fusion, mask=MASK, seed=self.seed, **parameters
        )

    def _plain(self, fusion: str, *, weight: float, **parameters: Any) -> Recipe:
        return recipe(fusion, GROUPS["two"], weight, **parameters)


def _prepared(name: str, label: str, **kind: bool) -> Row:
    return Row(name, label, None, {"as it is": Making(model=name)}, **kind)
