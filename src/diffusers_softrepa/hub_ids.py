"""What of a model's name may be told to others: a Hub repository id is public, a path on somebody's disk is not."""

import os
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots(?:[/\\]|\Z)")


def hub_id(name: str | os.PathLike[str] | None) -> str | None:
    """Returns the Hub repository id that a model's name or path means, or None.

    Args:
        name: What a model was loaded from. `user/name` is an id unless a file or folder of that name is here; a path
            into the Hub's cache, `.../models--user--name/snapshots/...`, means the repository that was cached; every
            other path means none.
    """
    if name is None:
        return None
    text = os.fspath(name)
    cached = _SNAPSHOT.search(text)
    if cached:
        text = "/".join(cached.groups())
    try:
        if text.count("/") != 1 or (not cached and Path(text).exists()):
            return None
        validate_repo_id(text)
    except (HFValidationError, OSError, ValueError):
        return None
    return text
