"""mergekit's options of a merge, with those of this package."""

from mergekit.options import MergeOptions

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
