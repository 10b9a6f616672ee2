"""What an image of an evaluation was drawn with, kept in the image itself: a text chunk of the PNG.

So an image tells its settings where the evaluation's manifest has been lost, and an image that was cut, edited or put
in another one's place is seen before it is scored: the chunk holds a digest of the pixels.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..files import UnreadableJSON, parse_json, whole_file

_CHUNK = "softrepa"
_END = b"IEND\xaeB`\x82"  # of every PNG


class CutImage(ValueError):
    """A file of an evaluation is no whole image."""


def save_with_facts(image: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Saves an image as PNG, whole or not at all, with what it was drawn with.

    Args:
        image: The image.
        path: The file.
        facts: What it was drawn with, as JSON can hold it.

    Raises:
        OSError: The file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(_CHUNK, json.dumps({"facts": facts, "pixels": _digest(image)}))
    with whole_file(path) as file:
        image.save(file, format="PNG", pnginfo=chunks)


def facts_of(path: Path) -> Any:
    """Returns what an image was drawn with; None for an image that `save_with_facts` did not write, or not as it is.

    Args:
        path: The file.

    Raises:
        CutImage: It is no whole image.
        OSError: There is no such file, or it cannot be read.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                raise ValueError("its end is missing")
            text, digest = image.info.get(_CHUNK), _digest(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise CutImage(f"{path} is no whole image: {error}") from error
    try:
        kept = parse_json(text or "null", f"the text in {path}")
    except UnreadableJSON:
        return None
    return kept.get("facts") if isinstance(kept, dict) and kept.get("pixels") == digest else None


def _digest(image: Image.Image) -> str:
    return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()[:16]}"
