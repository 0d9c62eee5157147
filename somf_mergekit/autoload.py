"""Make mergekit know this package's merge methods in any process that imports it.

Nothing here can make an import fail.
"""

import logging
import sys
from importlib import import_module
from types import ModuleType

LOG = logging.getLogger("somf_mergekit")


def install() -> None:
    """Hook the import of mergekit's modules. Imports nothing heavy; called by torch."""
    import wrapt

    hooks = {
        # Loaded after torch, whichever of mergekit's modules comes first in a process.
        "mergekit.merge_methods.registry": _on_registry,
        "mergekit.plan": _on_plan,
        "mergekit.merge": _on_merge,
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
    """
    import mergekit.merge

    _adopt_methods()
    _adopt_plan()
    _adopt_merge(mergekit.merge)


def _on_registry(_module: ModuleType) -> None:
    _carefully(_adopt_methods)


def _on_plan(_module: ModuleType) -> None:
    _carefully(_adopt_plan)


def _on_merge(module: ModuleType) -> None:
    # The planner again: it had no hook where it was the module that imported torch.
    _carefully(_adopt_plan)
    _carefully(_adopt_merge, module)


def _carefully(action, *arguments) -> None:  # type: ignore[no-untyped-def]
    """Run an action; an error of ours becomes a warning, never a failed import of mergekit."""
    try:
        action(*arguments)
    except Exception as error:
        found = "unknown"
        try:
            from importlib.metadata import version

            found = version("mergekit")
        except Exception:
            pass
        LOG.warning(
            "somf-mergekit could not add its merge methods to mergekit %s: %s: %s",
            found,
            type(error).__name__,
            error,
        )


def _adopt_methods() -> None:
    # Each module registers its methods as its last act. So it does not matter whether it is
    # imported here, or is itself the one whose imports have called this hook.
    import_module("somf_mergekit.method")
    import_module("somf_mergekit.repairs.methods")


def _adopt_plan() -> None:
    import_module("somf_mergekit.planner")


def _adopt_merge(module: ModuleType) -> None:
    from .planner import wrap_run_merge

    wrap_run_merge(module)
    # A command imported before us has bound the function itself.
    for name in ("mergekit.scripts.run_yaml", "mergekit.scripts.multimerge"):
        script = sys.modules.get(name)
        if script is not None and hasattr(script, "run_merge"):
            script.run_merge = module.run_merge  # type: ignore[attr-defined]
