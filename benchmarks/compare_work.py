"""What is to be done, in which order, and what is chosen."""

import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .compare_recipes import GROUPS
from .compare_rows import LINE, Row, reference_setting
from .compare_rule import Choice, Measures, Score, chosen, mean_score, score
from .compare_runs import Bench, Missing, Run
from .compare_splits import HELD_BACK, VALIDATION

# Seconds until it is looked again whether other calls ended what they were at.
PAUSE = 30.0


@dataclass(frozen=True)
class Comparison:
    """All runs of all seeds.

    Attributes:
        bench: what they share.
        rows: by seed and name; the same names and settings for every seed.
        tuning: the seeds whose validation settings are chosen on.
    """

    bench: Bench
    rows: dict[int, dict[str, Row]]
    tuning: tuple[int, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds that are tested."""
        return list(self.rows)

    @property
    def order(self) -> list[Row]:
        """The rows, those of the first seed, in the order of the work."""
        return list(next(iter(self.rows.values())).values())

    def run(self, row: str, setting: str, seed: int) -> Run:
        """Return a run."""
        return Run(self.bench, self.rows[seed][row], setting, seed)

    def seeds_of(self, row: Row, seeds: Sequence[int]) -> list[int]:
        """Return those of ``seeds`` that a row is measured under."""
        if row.is_single:
            return [seed for seed in seeds if seed == self.seeds[0]]
        return list(seeds)[:1] if row.is_shared else list(seeds)

    def matching(self, only: str | None) -> set[str]:
        """Return the names of the rows that ``only`` names: patterns with commas between them."""
        patterns = only.split(",") if only else ["*"]
        return {r.name for r in self.order if any(fnmatch.fnmatch(r.name, p) for p in patterns)}

    def wanted(self, only: str | None) -> list[tuple[Row, list[str]]]:
        """Return the rows with the settings that are to be worked on.

        Args:
            only: see ``matching``; what those are measured against comes with them.
        """
        matching = self.matching(only)
        groups = {row.group for row in self.order if row.name in matching and row.group}
        against = {"aligned", *(name for group in groups for name in GROUPS[group])}
        found = []
        for row in self.order:
            if row.name in matching or row.name in against:
                found.append((row, list(row.settings)))
            elif row.group in groups and row.name == LINE[row.group]:
                found.append((row, [reference_setting(row.group)]))
        return found

    def validations(self, row: Row, settings: Sequence[str]) -> Iterator[tuple[Run, str]]:
        """Yield what must be measured before the row's setting can be chosen."""
        if not (row.is_needed or row.is_line or len(row.settings) > 1):
            return
        for seed in self.seeds_of(row, self.tuning):
            for setting in settings:
                yield self.run(row.name, setting, seed), VALIDATION

    def tests(self, row: Row, settings: Sequence[str]) -> Iterator[tuple[Run, str]]:
        """Yield what is tested: the chosen setting, once it is known, or all of them."""
        found = list(settings)
        if not row.tests_all and len(found) > 1:
            choice = self.choice(row)
            found = [choice.setting] if choice else []
        for seed in self.seeds_of(row, self.seeds):
            for setting in found:
                yield self.run(row.name, setting, seed), HELD_BACK

    def choice(self, row: Row) -> Choice | None:
        """Return the chosen setting of a row; None while its validation is not complete."""
        if len(row.settings) == 1:
            return Choice(next(iter(row.settings)), True)
        scores = self.validation_scores(row)
        plain = self.plain_score(row)
        if plain is None or any(found is None for found in scores.values()):
            return None
        return chosen({name: s for name, s in scores.items() if s}, plain)

    def validation_scores(self, row: Row) -> dict[str, Score | None]:
        """Return the mean score of each setting over the tuning seeds, None where one lacks."""
        return {setting: self._score(row.name, setting, row.group) for setting in row.settings}

    def plain_score(self, row: Row) -> Score | None:
        """Return the score of the plain merge that a row is measured against."""
        group = str(row.group)
        return self._score(LINE[group], reference_setting(group), group)

    def measures(self, row: str, setting: str, seed: int, split: str) -> Measures | None:
        """Return what was measured of a run, None where it was not."""
        return self.run(row, setting, seed).measures(split)

    def prepared(self, name: str, seed: int, split: str) -> Measures | None:
        """Return what was measured of a prepared model."""
        return self.measures(name, next(iter(self.rows[seed][name].settings)), seed, split)

    def missing(self, row: Row, settings: Sequence[str]) -> Missing:
        """Return what is to be done of a row; while nothing is chosen, the first setting stands
        for the chosen one.
        """
        found: Missing = {}
        planned = [*self.validations(row, settings), *self.tests(row, settings)]
        if not any(split == HELD_BACK for _, split in planned):
            first = settings[0]
            seeds = self.seeds_of(row, self.seeds)
            planned += [(self.run(row.name, first, seed), HELD_BACK) for seed in seeds]
        for run, split in planned:
            found |= run.missing(split)
        return found

    def work_through(
        self, only: str | None, *, keep: bool, on_run: Callable[[Run, str], object]
    ) -> None:
        """Do what is to be done, row after row, each for all seeds; other calls may help.

        Args:
            only: see ``matching``.
            keep: leave the models of finished rows where they are.
            on_run: called with each run that is to be measured, and the split; measures it.
        """
        tried: set[tuple[Path, str]] = set()
        while self._pass(only, keep, on_run, tried):
            time.sleep(PAUSE)

    def _pass(
        self,
        only: str | None,
        keep: bool,
        on_run: Callable[[Run, str], object],
        tried: set[tuple[Path, str]],
    ) -> bool:
        """Do what is to be done, but for what another call is at; return whether one is.

        Args:
            only, keep, on_run: as of ``work_through``.
            tried: what was begun; it may have failed, and is not begun again.
        """
        is_busy = False
        for row, settings in self.wanted(only):
            for part in (self.validations, self.tests):
                for run, split in part(row, settings):
                    if run.measures(split) is not None or (run.folder, split) in tried:
                        continue
                    with run.claimed() as is_ours:
                        is_busy |= not is_ours
                        # Another call may have ended since.
                        if is_ours and run.measures(split) is None:
                            tried.add((run.folder, split))
                            on_run(run, split)
            if not keep and not self.missing(row, settings):
                self._drop_models(row)
        return is_busy

    def _drop_models(self, row: Row) -> None:
        for seed in self.seeds_of(row, self.seeds):
            for setting in row.settings:
                run = self.run(row.name, setting, seed)
                with run.claimed() as is_ours:
                    if is_ours:
                        run.drop_model()

    def _score(self, row: str, setting: str, group: str | None) -> Score | None:
        scores = []
        for seed in self.seeds_of(self.rows[self.seeds[0]][row], self.tuning):
            measures = self.measures(row, setting, seed, VALIDATION)
            base = self.prepared("aligned", seed, VALIDATION)
            if measures is None or base is None:
                return None
            scores.append(score(measures, base, GROUPS[str(group)]))
        return mean_score(scores)
