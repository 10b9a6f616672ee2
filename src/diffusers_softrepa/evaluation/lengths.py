"""Prompts that no text encoder of a pipeline reads to their end, found before anything is drawn."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from .prompts import Prompt

_ENDLESS = 1_000_000  # what tokenizers without a limit say is far above


def check_lengths(pipe: Any, prompts: Sequence[Prompt], arguments: Mapping[str, Any]) -> None:
    """Raises if a prompt is longer than every text encoder of the pipeline reads, so that its end would be lost.

    Args:
        pipe: A pipeline with tokenizers.
        prompts: The prompts.
        arguments: What the pipeline is called with; `max_sequence_length` counts.

    Raises:
        ValueError: One is too long; the message names it, its length and the limit.
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
                f"{counts[name] - excess}: what it ends with would not be drawn, yet scored; shorten it, leave it "
                "out, raise max_sequence_length where the pipeline takes one, or pass allow_truncation=True"
            )


def _limits(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns how many tokens each text encoder reads, by its tokenizer's name; None where that is not known."""
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
