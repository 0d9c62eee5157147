"""What is wrong with an installation, and how to mend it."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points

from ..common.requirements import installed, supported, version_problems

_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_OWN_COMMAND = "`mergekit-somf merge` works without it"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what it is.
        found: what there is, in words.
        remedy: what to do; empty where nothing is wrong.
    """

    subject: str
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Return what `mergekit-yaml` would meet in this environment, without adding anything to it."""
    # It imports torch, which calls the entry point.
    hooks = list(_hooks())
    return [*_versions(), *_autoload(), *hooks]


def _versions() -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    yield Finding("somf-mergekit", installed("somf-mergekit"))
    wrong = {problem.split()[0]: problem.split(": ", 1)[1] for problem in version_problems()}
    for name, wanted in supported().items():
        found = f"{installed(name)}, supported is {wanted}"
        yield Finding(name, found, wrong.get(name, ""))


def _autoload() -> Iterator[Finding]:
    is_off = os.environ.get(_SWITCH) == "0"
    yield Finding(
        _SWITCH,
        os.environ.get(_SWITCH, "not set"),
        f"unset it, so that torch loads the hook; {_OWN_COMMAND}" * is_off,
    )
    points = [p for p in entry_points(group="torch.backends") if p.name == "somf_mergekit"]
    again = "install the package again: pip install --force-reinstall --no-deps somf-mergekit"
    if not points:
        yield Finding("entry point", "torch finds none of somf-mergekit", again)
        return
    try:
        failure = getattr(import_module(points[0].module), "failure", None)
    except ImportError as error:
        failure = error
    if failure is None:
        yield Finding("entry point", points[0].value)
    else:
        yield Finding("entry point", f"failed: {type(failure).__name__}: {failure}", again)


def _hooks() -> Iterator[Finding]:
    try:
        import mergekit.merge
        import mergekit.merge_methods
        import mergekit.plan
    except ImportError as error:
        yield Finding("mergekit", f"can't be imported: {error}", "pip install mergekit")
        return
    from .autoload import failures

    why = "; ".join(f"{type(error).__name__}: {error}" for error in failures)
    places = {
        "merge method somf": any(
            m.spec.name == "somf" for m in mergekit.merge_methods.registered_methods()
        ),
        "planner": hasattr(mergekit.plan.MergePlanner._plan, "__wrapped__"),
        "run_merge": hasattr(mergekit.merge.run_merge, "__wrapped__"),
    }
    for place, is_live in places.items():
        if is_live:
            yield Finding(place, "added to mergekit")
        else:
            remedy = "install supported versions" if why else "mend what is named above"
            yield Finding(place, "not added to mergekit" + f" ({why})" * bool(why), remedy)
