"""Weights and packages that metrics need: had, or one sentence about what is missing and how to get it."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGES = {"lpips": "lpips", "ImageReward": "image-reward"}


def load(cls: Any, source: str, needed_by: str, **options: Any) -> Any:
    """Returns `cls.from_pretrained(source)`.

    Args:
        cls: A class of transformers.
        source: A Hub id or a folder.
        needed_by: Name of the metric.
        options: Further arguments.

    Raises:
        OSError: It cannot be had; the library's own error is the cause.
    """
    try:
        return cls.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        way = (
            "complete the folder"
            if Path(source).exists()
            else f"download it once with `hf download {source}` while online"
        )
        raise OSError(
            f"{needed_by} needs {cls.__name__} of {source}, which cannot be loaded ({reason}); {way}, or "
            "give a folder that holds it"
        ) from error


def package(name: str, needed_by: str) -> ModuleType:
    """Returns an optional package.

    Raises:
        ImportError: It is not installed, or does not import beside what is installed.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # old packages fail in many ways beside new ones
        raise ImportError(
            f"{needed_by} is scored by the package {_PACKAGES[name]}, which cannot be imported ({error}); install it "
            f"with `pip install {_PACKAGES[name]}`, in an environment of its own if it does not fit this one"
        ) from error
