"""The model card of an adapter: metadata for the Hub, a settings table, and code that loads the adapter.

The text that this package writes is in sections between HTML comments, which the rendered page does not show. When a
card is updated, only these sections and the metadata change. Text outside the sections is kept, and a card without
sections is not changed at all.
"""

import json
import re
from bisect import bisect
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import SoftREPAConfig
from .hub_ids import hub_id as hub_id
from .quoting import in_markdown, one_line, quoted

_UNKNOWN_BASE = "the/base-model"
_MAX_METADATA, _MAX_DEPTH = 1 << 18, 32
_METADATA = re.compile(rf"\A---\r?\n(.{{0,{_MAX_METADATA}}}?)\r?\n---(?:\r?\n|\Z)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:softrepa:(\w{1,64}) [^<>]{0,400}-->(?=\r?\n)|/softrepa:(\w{1,64}) -->)")
_IMAGE = re.compile(r"!\[[^\[\]]{0,1000}\]\(([^()\s]{1,1000})\)")

_ADAPTER = """# SoftREPA adapter{for_base}

Soft text tokens for a frozen {family} denoiser: {count:,} parameters, trained so that images match their
prompts better.

## Use it

```python
import diffusers_softrepa
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_softrepa({source})
```

`pipe.set_softrepa("softrepa", 0.5)` weakens the adapter, and `pipe.disable_softrepa()` turns it off.

## Settings

| setting | value |
| --- | --- |
{settings}

Method: [SoftREPA](https://arxiv.org/abs/2503.08250), contrastive soft text tokens."""


def model_card(
    config: SoftREPAConfig, repo_id: str, *, weight_name: str | None = None, license: str | None = None
) -> ModelCard:
    """Returns the model card of an adapter.

    Args:
        config: Configuration of the adapter. The card names its base model if that is on the Hub; a local path is left
            out.
        repo_id: Hub repository id for the code that loads the adapter.
        weight_name: Name of the weights file. Defaults to the default file name, which the card leaves out.
        license: Licence as the Hub spells it, such as `"apache-2.0"`. Defaults to none.
    """
    base = hub_id(config.base_model_name_or_path)
    metadata: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": "diffusers",
        "license": license,
        "pipeline_tag": "text-to-image",
        "tags": ["softrepa", "diffusers", "text-to-image", "adapter", config.family],
    }
    rows = {
        "family": in_markdown(config.family),
        "tokens per layer": config.num_tokens,
        "layers": config.num_layers,
        "stages": in_markdown(", ".join(config.stages)) if config.stages else None,
        "timestep bins": config.num_timestep_bins,
        "width": config.token_dim,
    }
    file = f", weight_name={_in_code(weight_name)}" if weight_name else ""
    text = _ADAPTER.format(
        for_base=f" for {base}" if base else "",
        family=in_markdown(config.family),
        count=config.num_parameters,
        base=base or _UNKNOWN_BASE,
        source=f"{_in_code(repo_id)}{file}",
        settings="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
    )
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{section('adapter', text)}\n")


def _in_code(text: str) -> str:
    """Returns a text as a string literal for the code of the card; no text can end the literal or its code block."""
    return json.dumps(one_line(text, 300), ensure_ascii=False).replace("`", "\\u0060").replace("<", "\\u003c")


def check_license(license: object) -> None:
    """Checks that a licence can stand in a card; the Hub itself decides which ones it knows.

    Args:
        license: The licence as the Hub spells it; None for none.

    Raises:
        ValueError: It is not a short printable text.
    """
    fits = isinstance(license, str) and license.strip() and license.isprintable() and len(license) <= 100
    if license is not None and not fits:
        raise ValueError(
            f"a licence must be a text as the Hub spells it, such as 'apache-2.0', but is {quoted(license)}"
        )


def section(name: str, text: str) -> str:
    """Returns Markdown as a section that `refreshed` can replace.

    Args:
        name: Name of the section, one word.
        text: Markdown of the section.
    """
    note = "is written by diffusers-softrepa and replaced when it writes again; write above or below it"
    return f"<!-- softrepa:{name} {note} -->\n{text}\n<!-- /softrepa:{name} -->"


def refreshed(existing: str, fresh: str) -> str:
    """Returns an existing card with its sections and metadata updated from a newly written card.

    Args:
        existing: The existing card. A card without sections was written by hand and is returned unchanged.
        fresh: The newly written card. Its sections replace those of the same name; new sections are added after the
            last one. Its metadata replace values of the same key. Lists are joined; an evaluation result replaces one
            of the same metric on the same data, and a gallery entry one of the same image. Other keys are kept.
    """
    if not _sections(existing):
        return existing
    text = _with_metadata(existing, fresh)
    for name, first, last in _sections(fresh):
        present = {old: (start, end) for old, start, end in _sections(text)}
        written = fresh[first:last]
        if name in present:
            start, end = present[name]
            text = text[:start] + written + text[end:]
        else:
            end = max(end for _, end in present.values())
            text = f"{text[:end]}\n\n{written}{text[end:]}"
    return text


def words_by_hand(card: str) -> str:
    """Returns the text of a card without its metadata and without the sections of this package."""
    parts, done = [], 0
    for _, start, end in _sections(card):
        parts.append(card[done:start])
        done = end
    return _METADATA.sub("", "".join([*parts, card[done:]])).strip()


def metadata_of(card: str) -> dict[str, Any]:
    """Returns the metadata of a card, or an empty mapping if they are not a plain YAML mapping of moderate size."""
    block = _METADATA.match(card)
    try:
        found = yaml.load(block[1], _PlainLoader) if block else None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError):  # invalid dates, unhashable keys
        return {}
    return found if isinstance(found, dict) and all(isinstance(key, str) for key in found) else {}


def _sections(text: str) -> list[tuple[str, int, int]]:
    """Returns name, start and end of each section, in time linear in the length of the text."""
    markers = list(_MARKER.finditer(text))
    ends: dict[str, list[int]] = {}
    for marker in markers:
        if marker[2]:
            ends.setdefault(marker[2], []).append(marker.end())
    found: list[tuple[str, int, int]] = []
    for marker in markers:
        if marker[1] and (not found or marker.start() >= found[-1][2]):
            closing = ends.get(marker[1], [])
            place = bisect(closing, marker.end())
            if place < len(closing):
                found.append((marker[1], marker.start(), closing[place]))
    return found


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML of limited depth and without aliases, with which a few bytes can expand to any amount of data."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _with_metadata(existing: str, fresh: str) -> str:
    """Returns the existing card with updated metadata, or unchanged if they are not a plain YAML mapping."""
    block = _METADATA.match(existing)
    if existing.startswith("---") and not (block and metadata_of(existing)):
        return existing
    head, text = (existing[: block.end()], existing[block.end() :]) if block else ("", existing)
    try:
        card = ModelCard(head, ignore_metadata_errors=True)
        new = ModelCard(fresh, ignore_metadata_errors=True)
        before = card.data.to_dict()
        _update(card, new)
        return existing if card.data.to_dict() == before else str(card) + text
    except Exception:  # metadata may hold anything, and huggingface_hub checks little of it
        return existing


def _update(card: ModelCard, new: ModelCard) -> None:
    """Updates the metadata of a card from those of another: lists are joined, other values are replaced."""
    for key, value in vars(new.data).items():
        old = card.data.get(key)
        if isinstance(value, list) and isinstance(old, list):
            identity = _IDENTITIES.get(key)
            replaced = [identity(entry) for entry in value] if identity else []
            kept = [entry for entry in old if not identity or identity(entry) not in replaced]
            value = [*kept, *(entry for entry in value if entry not in kept)]
        if value is not None:
            card.data[key] = value


def _measured(result: EvalResult) -> tuple[object, str]:
    """Returns the identity of an evaluation result: its task and data set, and its metric."""
    return result.unique_identifier, result.metric_type


def _image_of(example: Any) -> Any:
    """Returns the image file of a gallery entry."""
    output = example.get("output") if isinstance(example, dict) else None
    return output.get("url") if isinstance(output, dict) else example


def images_of(card: str) -> list[str]:
    """Returns the relative paths of the image files that a card shows, in its text and in its gallery."""
    named = _IMAGE.findall(_METADATA.sub("", card))
    gallery = metadata_of(card).get("widget")
    named += [_image_of(example) for example in gallery] if isinstance(gallery, list) else []
    beside = [name for name in named if isinstance(name, str) and _is_beside(name)]
    return list(dict.fromkeys(str(PurePosixPath(name)) for name in beside))


def _is_beside(name: str) -> bool:
    """Returns whether a name is that of an image file inside the folder of the card, not a URL or an outside path."""
    path = PurePosixPath(name)
    odd = any(sign in name for sign in ":\\%?#") or not name.isprintable() or len(name) > 255
    inside = not path.is_absolute() and not odd and not any(part.startswith(".") for part in path.parts)
    return inside and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif")


# Entries of a list with equal identities are versions of the same entry.
_IDENTITIES: dict[str, Callable[[Any], Any]] = {"eval_results": _measured, "widget": _image_of}
