"""Which versions of other packages are installed, and which this one takes."""

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from .errors import raise_together

_OURS = "somf-mergekit"
_DECIDING = (_OURS, "mergekit", "torch", "transformers")
_NOT_INSTALLED = "(not installed)"


@cache
def installed(package: str) -> str:
    """Return the version of a package that is installed, in words."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _NOT_INSTALLED


def versions() -> dict[str, str]:
    """Return the versions of what a mask, a merge and a measured value depend on."""
    return {name: installed(name) for name in _DECIDING}


def supported() -> dict[str, str]:
    """Return the versions that this package takes of each that it needs, as ``<0.2,>=0.1.5``.

    Empty in a checkout that isn't installed.
    """
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in requires(_OURS) or []]
    except PackageNotFoundError:
        return {}
    return {
        one.name: str(one.specifier)
        for one in needed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def version_problems() -> list[str]:
    """Return what is wrong with the versions of the installed packages, a sentence each."""
    from packaging.specifiers import SpecifierSet

    return [
        f"{name} {installed(name)} is installed, and {name}{wanted} is supported: "
        f"pip install '{name}{wanted}'"
        for name, wanted in supported().items()
        if installed(name) == _NOT_INSTALLED
        or not SpecifierSet(wanted).contains(installed(name), prereleases=True)
    ]


def check_versions() -> None:
    """Check that the installed packages are those that this one takes.

    Raises:
        RecipeError: they are not, all of it together.
    """
    raise_together(version_problems(), "The installed packages don't go with this one")
