"""Make mergekit know this package's merge methods in any process that imports it.

Nothing here can make an import fail.
"""

import logging
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LOG = logging.getLogger("somf_mergekit")
# What went wrong where an error would have broken the import of mergekit.
failures: list[Exception] = []
# What is added to mergekit as soon as the modules that it needs are imported to their end.
_waiting: list[tuple[Callable[[ModuleType], None], ModuleType]] = []


def install() -> None:
    """Hook the import of mergekit's modules. Imports nothing heavy; called by torch."""
    import wrapt

    for name, add in _HOOKS.items():
        wrapt.register_post_import_hook(partial(_carefully, add), name)


def register() -> None:
    """Make mergekit know this package's merge methods in this process, now. Safe to repeat.

    Raises:
        ImportError: mergekit is missing.
        RecipeError: the installed version lacks what we need of it.
    """
    import mergekit.merge  # noqa: F401

    from ..common.errors import RecipeError, first_line
    from ..common.requirements import check_versions, installed

    check_versions()
    try:
        for name, add in _HOOKS.items():
            if name in sys.modules:
                add(sys.modules[name])
    except (AttributeError, ImportError) as error:
        raise RecipeError(
            f"somf can't be added to mergekit {installed('mergekit')}: {first_line(error)}. "
            "`mergekit-somf doctor` says which versions go together."
        ) from error


def _carefully(add: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Add to a module of mergekit; an error becomes a warning, never a failed import of mergekit.

    That waits for a module of mergekit's that is importing torch at this moment, and for one of
    ours that is importing mergekit: what is needed may stand further down in them.
    """
    ours = [m for name, m in list(sys.modules.items()) if name.startswith("somf_mergekit.")]
    unfinished = next(filter(_is_half_imported, [module, *ours]), None)
    if unfinished is not None:
        unfinished.__spec__.__class__ = _AnnouncedSpec
        _waiting.append((add, module))
        return
    try:
        add(module)
    except Exception as error:
        failures.append(error)
        LOG.warning(
            "somf-mergekit could not add its merge methods to mergekit: %s: %s; "
            "`mergekit-somf doctor` says what is wrong",
            type(error).__name__,
            error,
        )


class _AnnouncedSpec(ModuleSpec):
    """A module's spec that adds what waits when Python marks the module's import as complete."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            waiting, _waiting[:] = list(_waiting), []
            for add, module in waiting:
                _carefully(add, module)


def _is_half_imported(module: ModuleType) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def _add_methods(_module: ModuleType) -> None:
    import_module("somf_mergekit.plugin.method")
    import_module("somf_mergekit.repairs.repair_methods")


def _add_planner(_module: ModuleType) -> None:
    import_module("somf_mergekit.plugin.planner")


def _add_merge(module: ModuleType) -> None:
    from .planner import wrap_run_merge

    wrap_run_merge(module)
    # A command imported before us has bound the function itself.
    for name in ("mergekit.scripts.run_yaml", "mergekit.scripts.multimerge"):
        script = sys.modules.get(name)
        if script is not None and hasattr(script, "run_merge"):
            script.run_merge = module.run_merge  # type: ignore[attr-defined]


def _add_steps(module: ModuleType) -> None:
    from .multi_steps import wrap_steps

    wrap_steps(module)


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "mergekit.merge_methods.registry": _add_methods,
    "mergekit.plan": _add_planner,
    "mergekit.merge": _add_merge,
    "mergekit.scripts.multimerge": _add_steps,
}
