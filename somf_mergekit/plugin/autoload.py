"""Make mergekit know this package's merge methods in any process that imports it.

Nothing here can make an import fail.
"""

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LOG = logging.getLogger("somf_mergekit")
# What went wrong where an error would have broken the import of mergekit.
failures: list[Exception] = []


def install() -> None:
    """Hook the import of mergekit's modules. Imports nothing heavy; called by torch."""
    import wrapt

    hooks = {
        # Loaded after torch, whichever of mergekit's modules comes first in a process.
        "mergekit.merge_methods.registry": _on_registry,
        "mergekit.plan": _on_plan,
        "mergekit.merge": _on_merge,
        "mergekit.scripts.multimerge": _on_steps,
    }
    for name, hook in hooks.items():
        loading = sys.modules.get(name)
        # A module that is importing torch at this moment is not complete: too early for a hook.
        if loading is None or not getattr(loading.__spec__, "_initializing", False):
            wrapt.register_post_import_hook(hook, name)


def register() -> None:
    """Make mergekit know this package's merge methods in this process, now. Safe to repeat.

    Raises:
        ImportError: mergekit is missing.
        RecipeError: the installed version lacks what we need of it.
    """
    import mergekit.merge

    from ..common.errors import RecipeError, first_line
    from ..common.requirements import check_versions, installed

    check_versions()
    try:
        _adopt_methods()
        _adopt_plan()
        _adopt_merge(mergekit.merge)
        if "mergekit.scripts.multimerge" in sys.modules:
            _adopt_steps(sys.modules["mergekit.scripts.multimerge"])
    except (AttributeError, ImportError) as error:
        raise RecipeError(
            f"somf can't be added to mergekit {installed('mergekit')}: {first_line(error)}. "
            "`mergekit-somf doctor` says which versions go together."
        ) from error


def _on_registry(_module: ModuleType) -> None:
    _carefully(_adopt_methods)


def _on_plan(_module: ModuleType) -> None:
    _carefully(_adopt_plan)


def _on_merge(module: ModuleType) -> None:
    # The planner again: it had no hook where it was the module that imported torch.
    _carefully(_adopt_plan)
    _carefully(_adopt_merge, module)


def _on_steps(module: ModuleType) -> None:
    _carefully(_adopt_steps, module)


class _Announced(ModuleSpec):
    """A module's spec that runs what waits for the end of the module's import.

    That end is where Python takes back the mark that the import is in progress.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            waiting = self.__dict__.pop("_somf_waiting", [])
            for action, arguments in waiting:
                _carefully(action, *arguments)


def _spec_in_progress() -> ModuleSpec | None:
    """Return the spec of the outermost of our modules that is being imported, if one is."""
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if name.startswith("somf_mergekit.") and getattr(spec, "_initializing", False):
            return spec
    return None


def _carefully(action: Callable[..., None], *arguments: Any) -> None:
    """Run an action; an error of ours becomes a warning, never a failed import of mergekit.

    Where one of our own modules has imported mergekit, the action waits until that is complete: it
    may need what stands further down in it.
    """
    unfinished = _spec_in_progress()
    if unfinished is not None:
        unfinished.__class__ = _Announced
        unfinished.__dict__.setdefault("_somf_waiting", []).append((action, arguments))
        return
    try:
        action(*arguments)
    except Exception as error:
        failures.append(error)
        LOG.warning(
            "somf-mergekit could not add its merge methods to mergekit: %s: %s; "
            "`mergekit-somf doctor` says what is wrong",
            type(error).__name__,
            error,
        )


def _adopt_methods() -> None:
    import_module("somf_mergekit.plugin.method")
    import_module("somf_mergekit.repairs.repair_methods")


def _adopt_plan() -> None:
    import_module("somf_mergekit.plugin.planner")


def _adopt_steps(module: ModuleType) -> None:
    from .multi_steps import wrap_steps

    wrap_steps(module)


def _adopt_merge(module: ModuleType) -> None:
    from .planner import wrap_run_merge

    wrap_run_merge(module)
    # A command imported before us has bound the function itself.
    for name in ("mergekit.scripts.run_yaml", "mergekit.scripts.multimerge"):
        script = sys.modules.get(name)
        if script is not None and hasattr(script, "run_merge"):
            script.run_merge = module.run_merge  # type: ignore[attr-defined]
