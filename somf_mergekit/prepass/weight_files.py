"""The files of a model's weights: their content identifies a model, whatever it is called."""

import hashlib
import os

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from ..common.digests import file_digests
from ..common.errors import RecipeError


def content_fingerprint(model: ModelReference, cache_dir: str | None = None) -> str:
    """Return a SHA-256 over the contents of a model's weight files.

    Args:
        model: its loader must be set up.
        cache_dir: see ``file_digests``.

    Raises:
        RecipeError: one can't be read.
    """
    index = LoaderCache().get(model).index
    files = sorted(set(index.tensor_paths.values()))
    try:
        paths = [os.path.join(index.base_path, file) for file in files]
        digests = file_digests(paths, cache_dir)
    except OSError as error:
        raise RecipeError(f"model {model}: a file of its weights can't be read: {error}") from error
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
