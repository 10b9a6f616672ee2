"""Loading of the models that metrics need, with errors that say what is missing and how to get it."""

from pathlib import Path
from typing import Any, Generic, TypeVar

Loaded = TypeVar("Loaded")


class HasModel(Generic[Loaded]):
    """Something that loads a model in `setup` and releases it in `close`."""

    _loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        """What `setup` loaded: a model, or a model with its processor.

        Raises:
            RuntimeError: `setup` has not been called, or `close` has.
        """
        if self._loaded is None:
            raise RuntimeError(f"{type(self).__name__} has no model yet; call setup(device) first")
        return self._loaded

    @loaded.setter
    def loaded(self, value: Loaded) -> None:
        self._loaded = value

    def close(self) -> None:
        """Releases what `setup` loaded."""
        self._loaded = None


def load(cls: Any, source: str, needed_by: str, **options: Any) -> Any:
    """Returns `cls.from_pretrained(source)`.

    Args:
        cls: A class of transformers.
        source: Hub id or folder.
        needed_by: Name of the metric, for messages.
        options: Further arguments of `from_pretrained`.

    Raises:
        OSError: It cannot be loaded; the error of transformers is the cause.
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
