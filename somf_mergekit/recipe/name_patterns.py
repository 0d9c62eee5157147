"""Which tensors a recipe's name patterns mean."""

import fnmatch


def may_get_mask(name: str, include: str, exclude: str) -> bool:
    """Return whether the patterns let the tensor ``name`` have a mask."""
    return _matches(name, include) and not _matches(name, exclude)


def _matches(name: str, patterns: str) -> bool:
    for pattern in (part.strip() for part in patterns.split(",")):
        if not pattern:
            continue
        if any(sign in pattern for sign in "*?["):
            if fnmatch.fnmatchcase(name, pattern):
                return True
        elif pattern in name:
            return True
    return False
