"""Where a command writes an image: never over one that is there."""

from itertools import count
from pathlib import Path


def free_path(path: str | Path, suffix: str) -> Path:
    """Returns a path that no file has: the given one, or with `-1`, `-2`, ... added to its name.

    Args:
        path: The path; the suffix is added where it has another one.
        suffix: Such as `.png`.
    """
    wanted = Path(path)
    if wanted.suffix.lower() != suffix:
        wanted = wanted.with_name(wanted.name + suffix)
    if not wanted.exists():
        return wanted
    numbered = (wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}") for number in count(1))
    return next(candidate for candidate in numbered if not candidate.exists())
