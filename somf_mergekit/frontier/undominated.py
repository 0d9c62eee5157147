"""Which points no other beats in both ways."""

from collections.abc import Mapping


def undominated(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points that no other is as good as in both ways and better in one."""
    return {
        name
        for name, point in points.items()
        if not any(
            all(b >= a for a, b in zip(point, other, strict=True)) and other != point
            for other in points.values()
        )
    }
