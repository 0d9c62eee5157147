"""lm-evaluation-harness, where it is installed: it is given the models, its numbers are stored."""

import fnmatch
import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from .evaluation import HarnessResults
from .evaluation_settings import EvaluationSettings, HarnessSettings
from .measured_models import Subject, content_digest

_STDERR = "_stderr"


class Harness:
    """Tasks of lm-evaluation-harness that were found.

    Attributes:
        tasks: their names.
        content: a digest of the folder with tasks of the user's own, empty without one.

    Raises:
        RecipeError: the package is not installed, or a task or the folder is not there.
    """

    def __init__(self, settings: HarnessSettings):
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RecipeError(
                f"--lm-eval needs the package lm-eval ({error}): pip install 'somf-mergekit[eval]'"
            ) from error
        folder = settings.folder
        if folder is not None and not os.path.isdir(folder):
            raise RecipeError(f"--lm-eval-tasks {folder}: no such folder")
        self._run = lm_eval.simple_evaluate
        self._manager = TaskManager(include_path=folder)
        known = list(self._manager.all_tasks)
        unknown = [task for task in settings.tasks if not fnmatch.filter(known, task)]
        if unknown:
            raise RecipeError(
                f"--lm-eval: lm-evaluation-harness knows no task {', '.join(unknown)}; "
                "--lm-eval-tasks DIR names a folder with tasks of your own"
            )
        self.tasks = [name for task in settings.tasks for name in fnmatch.filter(known, task)]
        self.content = content_digest(Path(folder), ("**/*.y*ml", "**/*.py")) if folder else ""

    def results(self, subject: Subject, settings: EvaluationSettings) -> HarnessResults:
        """Return value and standard error of each metric, by task: no text of any example."""
        found = self._run(
            model="hf",
            model_args={
                "pretrained": str(subject.folder),
                "dtype": settings.dtype,
                "trust_remote_code": settings.trust_remote_code,
            },
            tasks=self.tasks,
            batch_size=settings.batch_size,
            device=settings.place,
            limit=settings.limit,
            bootstrap_iters=settings.resamples,
            log_samples=False,
            task_manager=self._manager,
        )
        return {task: _metrics(row) for task, row in found["results"].items()}


def _metrics(row: dict[str, Any]) -> dict[str, list[float | None]]:
    """Return the metrics of a task; the harness writes ``acc,none`` and ``acc_stderr,none``."""
    found: dict[str, list[float | None]] = {}
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith(_STDERR) or _number(value) is None:
            continue
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found[name] = [_number(value), _number(row.get(f"{metric}{_STDERR},{filtered}"))]
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
