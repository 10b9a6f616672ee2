"""What an image of an evaluation was drawn with, stored in the image itself: a text chunk of the PNG.

An image can thus be checked when the evaluation's manifest has been lost. The chunk also holds a fingerprint of the
pixels, so that a truncated, edited or exchanged image is noticed before it is scored.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..files import UnreadableJSON, parse_json, whole_file
from ..fingerprints import fingerprint

_CHUNK = "softrepa"
_END = b"IEND\xaeB`\x82"  # of every PNG


class CutImage(ValueError):
    """A file of an evaluation is a truncated or damaged image, or not an image."""


def save_with_facts(image: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Saves an image as PNG, whole or not at all, with what it was drawn with.

    Args:
        image: The image.
        path: The file; its folder must exist.
        facts: What the image was drawn with, in types that JSON has.

    Raises:
        OSError: The file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(_CHUNK, json.dumps({"facts": facts, "pixels": image_fingerprint(image)}))
    with whole_file(path) as file:
        image.save(file, format="PNG", pnginfo=chunks)


def facts_of(path: Path) -> Any:
    """Returns what an image was drawn with.

    Args:
        path: The file.

    Returns:
        The facts given to `save_with_facts`; None if it did not write this image, or the image was changed since.

    Raises:
        CutImage: The file is truncated, damaged, or not an image.
        OSError: The file does not exist or cannot be read.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                raise ValueError("its end is missing")
            text, digest = image.info.get(_CHUNK), image_fingerprint(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise CutImage(f"{path} is truncated, damaged or not an image: {error}") from error
    try:
        kept = parse_json(text or "null", f"the text in {path}")
    except UnreadableJSON:
        return None
    return kept.get("facts") if isinstance(kept, dict) and kept.get("pixels") == digest else None


def image_fingerprint(image: Image.Image) -> str:
    """Returns mode, size and a fingerprint of the pixels of an image."""
    return f"{image.mode} {image.size} {fingerprint(image.tobytes())}"
