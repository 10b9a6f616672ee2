"""Paths of the images that commands write; existing files are never overwritten."""

import os
from itertools import count
from pathlib import Path

from ..files import check_places
from ..quoting import quoted


def free_path(path: str | Path, suffix: str) -> Path:
    """Returns the path of a new file: the given path, or that path with `-1`, `-2`, ... added to its name.

    Args:
        path: The path that is wanted.
        suffix: Suffix such as `.png`, added to a path that does not have it.

    Raises:
        ValueError: The folder of the file is a file, or may not be written.
    """
    wanted = Path(path)
    if not wanted.name:
        raise ValueError(f"the output must name a file, such as image{suffix}, but is {quoted(os.fspath(path))}")
    if wanted.suffix.lower() != suffix:
        wanted = wanted.with_name(wanted.name + suffix)
    check_places(wanted.parent, what="the folder of the output")
    if not wanted.exists():
        return wanted
    numbered = (wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}") for number in count(1))
    return next(candidate for candidate in numbered if not candidate.exists())
