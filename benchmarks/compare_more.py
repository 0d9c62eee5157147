"""Four models of the comparison on more pairs than its test has, and on other prompts.

The base, the plain merge, the merge of the defaults, and a rival that comes near to it.

The comparison's test has 133 pairs of few prompts and harmful prompts of one kind. Here are all
pairs of prompts that neither the base nor a merge learned from, and harmful prompts of other sets.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from somf_mergekit.dialogue import user_prompt
from somf_mergekit.evaluate import (
    Evaluation,
    EvaluationSets,
    NamedModel,
    evaluated,
    write_evaluation,
)
from somf_mergekit.evaluate.evaluation import row_of
from somf_mergekit.evaluate.measures import Measure, Ratio
from somf_mergekit.recipe import Settings

from .compare_call import call_of, read_comparison, with_options
from .compare_make import batches_of_pairs
from .compare_rows import CHAMPION, LINE, Row, reference_setting
from .compare_runs import Run
from .compare_splits import HELD_BACK, example_prompt, pair_prompt, split_prompts
from .compare_work import Comparison
from .real_data import OTHER_HARMFUL, SAFETY_PAIRS, prompts_of
from .real_training import alignment_examples

GROUP, FOLDER = "two", "compare-more"
# Trained by the objective of the defaults' mask and on its pairs, for a quarter of the steps.
RIVAL = "dpo_norm"
RESAMPLES = 2000


def compared_runs(comparison: Comparison) -> dict[str, list[Run]]:
    """Return the runs of every seed by the name of their model; the base is first."""
    found = {}
    for name in ("aligned", LINE[GROUP], CHAMPION[GROUP], RIVAL):
        row = comparison.rows[comparison.seeds[0]][name]
        setting = reference_setting(GROUP) if row.is_line else chosen_setting(comparison, row)
        label = f"{row.label}, {setting}" if row.group else row.label
        seeds = comparison.seeds_of(row, comparison.seeds)
        found[label] = [comparison.run(name, setting, seed) for seed in seeds]
    return found


def chosen_setting(comparison: Comparison, row: Row) -> str:
    """Return the setting of a row that the comparison has chosen.

    Raises:
        click.ClickException: it has chosen none yet.
    """
    choice = comparison.choice(row)
    if choice is None:
        raise click.ClickException(
            f"{row.name}: no setting is chosen yet; "
            f"run python -m benchmarks.compare --only {row.name}"
        )
    return choice.setting


def learned_prompts(comparison: Comparison, runs: Sequence[Run]) -> set[str]:
    """Return the prompts that the base was aligned with and that the runs have learned from."""
    from transformers import AutoTokenizer

    bench = comparison.bench
    models = bench.models
    training = models.trainings.aligned
    examples = alignment_examples(bench.pairs, models.data, training.examples, training.seed)
    found = set(map(example_prompt, examples))
    aligned = models.made("aligned", comparison.seeds[0], bench.pairs)
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    for run in runs:
        making = run.making
        learning = making.learns["parameters"] if making.learns else making.dpo
        if learning:
            settings = Settings(**learning)
            batches = batches_of_pairs(models.work / SAFETY_PAIRS, tokenizer, settings)
            # A pair knows its row in the file, which is written from these pairs.
            found |= {pair_prompt(bench.pairs[pair.row]) for batch in batches for pair in batch}
    return found


def more_sets(comparison: Comparison, learned: set[str]) -> EvaluationSets:
    """Return the test's pairs with all others that are not learned from, and other prompts."""
    bench = comparison.bench
    test = bench.sets[HELD_BACK]
    known = learned.union(*map(split_prompts, bench.sets.values()))
    others = (prompt for set_ in OTHER_HARMFUL for prompt in prompts_of(set_, bench.models.data))
    return EvaluationSets(
        harmful=[user_prompt(prompt) for prompt in dict.fromkeys(others) if prompt not in known],
        pairs=[*test.pairs, *(pair for pair in bench.pairs if pair_prompt(pair) not in learned)],
    )


def over_seeds(evaluation: Evaluation, models: Mapping[str, Sequence[str]]) -> Evaluation:
    """Return an evaluation of the seeds together: every example counts once for each seed.

    Resamples draw examples, with the answers of all seeds.

    Args:
        evaluation: of the models of all seeds.
        models: names there, by the name that they get together.
    """
    settings = evaluation.settings
    rows = []
    for row in evaluation.rows:
        ratios = {name: _summed(row.measure, names) for name, names in models.items()}
        together = replace(row.measure, models=ratios)
        rows.append(row_of(together, list(models), settings.resamples, settings.seed))
    told = {
        name: (
            "one model" if len(names) == 1 else f"{len(names)} models",
            ", ".join(evaluation.models[one][1] for one in names),
        )
        for name, names in models.items()
    }
    return replace(evaluation, models=told, base=next(iter(models)), rows=rows)


@contextmanager
def made(runs: Sequence[Run]) -> Iterator[list[Path]]:
    """Make the models of runs and keep them until the context ends.

    Raises:
        click.ClickException: another call is at one of the runs.
    """
    with ExitStack() as claims:
        for run in runs:
            if not claims.enter_context(run.claimed()):
                raise click.ClickException(f"another call is at {run.name}: wait for its end")
        try:
            yield [run.made() for run in runs]
        finally:
            for run in runs:
                run.drop_model()


@click.command()
@with_options
def main(**options: Any) -> None:
    """Measure four models of a comparison on more of two sets: base, plain merge, somf and DPO.

    Works in the comparison's folder and learns what masks are not there; what is measured is never
    measured again.
    """
    call = call_of(**options)
    comparison = read_comparison(call)
    models = compared_runs(comparison)
    runs = [run for of_a_model in models.values() for run in of_a_model]
    sets = more_sets(comparison, learned_prompts(comparison, runs))
    names = {
        label: [label] if len(of_it) == 1 else [f"{label} (seed {run.seed})" for run in of_it]
        for label, of_it in models.items()
    }
    with made(runs) as folders:
        of_all = zip([name for some in names.values() for name in some], folders, strict=True)
        evaluation = evaluated(
            [NamedModel(name, str(folder)) for name, folder in of_all],
            sets,
            replace(comparison.bench.measuring, resamples=RESAMPLES),
            comparison.bench.models.work / "more",
        )
    folder = call.out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    click.echo(write_evaluation(over_seeds(evaluation, names), folder))


def _summed(measure: Measure, names: Sequence[str]) -> Ratio:
    ratios = [measure.models[name] for name in names]
    totals, weights = (
        [sum(parts) for parts in zip(*columns, strict=True)]
        for columns in ([r.totals for r in ratios], [r.weights for r in ratios])
    )
    return Ratio(totals, weights)


if __name__ == "__main__":
    main()
