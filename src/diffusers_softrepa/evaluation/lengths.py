"""The check for prompts that are longer than every text encoder of a pipeline reads."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from .prompts import Prompt

_ENDLESS = 1_000_000  # tokenizers without a limit name one far above this


def check_lengths(pipe: Any, prompts: Sequence[Prompt], arguments: Mapping[str, Any]) -> None:
    """Checks that at least one text encoder of the pipeline reads each prompt to its end.

    Args:
        pipe: The pipeline. Without tokenizers, or with one whose limit is not known, any prompt passes.
        prompts: The prompts.
        arguments: Arguments of the pipeline's call, of which `max_sequence_length` is looked at.

    Raises:
        ValueError: A prompt is too long; the message has its id, its length and the limit.
    """
    limits = _limits(pipe, arguments)
    if not limits or None in limits.values():
        return
    for prompt in prompts:
        counts = {name: _count(getattr(pipe, name), prompt.text) for name in limits}
        beyond = {name: counts[name] - (limit or 0) for name, limit in limits.items()}
        if all(excess > 0 for excess in beyond.values()):
            name, excess = min(beyond.items(), key=lambda item: item[1])
            raise ValueError(
                f"prompt {prompt.id!r} has {counts[name]} tokens of {name}, but {type(pipe).__name__} reads "
                f"{counts[name] - excess}: the rest would not be drawn, but would be scored; shorten the prompt, "
                "leave it out, raise max_sequence_length where the pipeline takes one, or pass allow_truncation=True"
            )


def _limits(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the number of tokens that each text encoder reads, by its tokenizer's name; None if it is unknown."""
    taken = inspect.signature(type(pipe).__call__).parameters
    default = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
    asked = arguments.get("max_sequence_length", default)
    found: dict[str, int | None] = {}
    for name, part in getattr(pipe, "components", {}).items():
        if not name.startswith("tokenizer") or not callable(part):
            continue
        own = getattr(part, "model_max_length", None)
        own = own if isinstance(own, int) and own < _ENDLESS else None
        if "CLIP" in type(part).__name__:
            found[name] = own
        else:
            found[name] = asked if isinstance(asked, int) else None
    return found


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
