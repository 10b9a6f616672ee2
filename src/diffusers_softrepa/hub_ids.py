"""Hub repository ids in the names that models were loaded from; local paths are private and are never published."""

import os
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots(?:[/\\]|\Z)")


def hub_id(name: str | os.PathLike[str] | None) -> str | None:
    """Returns the Hub repository id in the name or path that a model was loaded from, or None.

    Args:
        name: The name or path. `user/name` is an id unless a local file or folder has that name; a path into the Hub
            cache, `.../models--user--name/snapshots/...`, gives the id of the cached repository; any other path None.
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
