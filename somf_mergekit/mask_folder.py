"""The folder that a learned mask is put in: nothing that is there is lost."""

import os

from .errors import RecipeError
from .masks import MASKS_FILE


def check_folder(folder: str) -> None:
    """Check that a mask can be put in ``folder`` without harm to what is there.

    Raises:
        RecipeError: it holds files, and none of them is a mask.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if found and MASKS_FILE not in found:
        raise RecipeError(f"folder {folder} holds files but no mask: name a new or an empty folder")


def make_room(folder: str) -> None:
    """Put a mask that is in ``folder`` aside."""
    if os.path.exists(os.path.join(folder, MASKS_FILE)):
        os.replace(folder, free_name(f"{folder}.before"))


def free_name(wanted: str) -> str:
    """Return ``wanted``, or the first of its numbered names that is not there."""
    name, number = wanted, 1
    while os.path.exists(name):
        number += 1
        name = f"{wanted}-{number}"
    return name
