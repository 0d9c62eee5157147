"""mergekit's options of a merge, with those of this package."""

from typing import Any

import click
from mergekit.options import OPTION_CATEGORIES, MergeOptions

from .machine import MachineOptions


class SomfOptions(MergeOptions):  # frozen, as that is
    """mergekit's options and ``machine``: how a mask is learned here."""

    machine: MachineOptions = MachineOptions()

    @classmethod
    def of(cls, options: MergeOptions) -> "SomfOptions":
        """Return options with the environment's machine, where mergekit itself has made them.

        Raises:
            RecipeError: an environment variable has a value that can't be used.
        """
        if isinstance(options, cls):
            return options
        return cls(**dict(options), machine=MachineOptions.from_environment())

    @classmethod
    def of_command(cls, values: dict[str, Any]) -> "SomfOptions":
        """Return what a command line says, and apply what of it concerns the process."""
        theirs = {k: v for k, v in values.items() if k in MergeOptions.model_fields}
        options = cls(**theirs, machine=MachineOptions.of(values))
        options.apply_global_options()
        return options


def mergekit_options() -> list[click.Parameter]:
    """Return the options of mergekit-yaml, in the order of their sections in --help."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    order = ("Performance", "Miscellaneous", "Output Settings", "Storage", "Dangerous Options")

    def rank(option: click.Parameter) -> int:
        section = OPTION_CATEGORIES.get(str(option.name), "")
        return order.index(section) if section in order else -1

    return sorted((p for p in mergekit_yaml.params if isinstance(p, click.Option)), key=rank)
