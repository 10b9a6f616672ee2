"""The model card of an adapter: metadata the Hub understands, and how to load it in three lines.

What this package writes stands in sections between HTML comments, which a page does not show. A card is only ever
changed inside them: what people write around them stays, and a card without them is theirs altogether.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .config import SoftREPAConfig

_UNKNOWN_BASE = "the/base-model"
_METADATA = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_SECTION = re.compile(r"<!-- softrepa:(\w+) [^>]*-->\n.*?<!-- /softrepa:\1 -->", re.DOTALL)

_ADAPTER = """# SoftREPA adapter{for_base}

Soft text tokens for a frozen {family} denoiser: {count:,} numbers trained to raise how well pictures match their prompts.

## Use it

```python
import diffusers_softrepa
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_softrepa({source})
```

Steer it with `pipe.set_softrepa("softrepa", 0.5)`, switch it off with `pipe.disable_softrepa()`.

## What it is

| setting | value |
| --- | --- |
{settings}

Method: [SoftREPA](https://arxiv.org/abs/2503.08250), contrastive soft text tokens."""


def model_card(
    config: SoftREPAConfig, repo_id: str, *, weight_name: str | None = None, license: str | None = None
) -> ModelCard:
    """Returns the card of an adapter.

    Args:
        config: What the adapter is. Its base model is named if it is on the Hub; a path is nobody else's business.
        repo_id: Where it will be found.
        weight_name: Its file's name where that is not the usual one.
        license: Its licence in the Hub's spelling, such as `"apache-2.0"`.
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
        "family": config.family,
        "tokens per layer": config.num_tokens,
        "layers": config.num_layers,
        "stages": ", ".join(config.stages) if config.stages else None,
        "timestep bins": config.num_timestep_bins,
        "width": config.token_dim,
    }
    file = f', weight_name="{weight_name}"' if weight_name else ""
    text = _ADAPTER.format(
        for_base=f" for {base}" if base else "",
        family=config.family,
        count=config.num_parameters,
        base=base or _UNKNOWN_BASE,
        source=f'"{repo_id}"{file}',
        settings="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
    )
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{section('adapter', text)}\n")


def section(name: str, text: str) -> str:
    """Returns Markdown as a section that `refreshed` finds again.

    Args:
        name: One word.
        text: Its Markdown.
    """
    note = "is written by diffusers-softrepa and replaced when it writes again; write above or below it"
    return f"<!-- softrepa:{name} {note} -->\n{text}\n<!-- /softrepa:{name} -->"


def refreshed(existing: str, fresh: str) -> str:
    """Returns a card with the sections and the metadata of a newly written one, and otherwise as it was.

    Args:
        existing: The card that is there. Without a section it was written by hand, and comes back as it is.
        fresh: The newly written card. Its sections replace those of the same name; new ones follow the last one.
            Its metadata replace those of the same key, lists are joined, results replace those of the same
            metric on the same data, examples of the gallery those of the same picture, further keys stay.
    """
    if _SECTION.search(existing) is None:
        return existing
    text = _with_metadata(existing, fresh)
    for found in _SECTION.finditer(fresh):
        present = {old.group(1): old for old in _SECTION.finditer(text)}
        last = max(old.end() for old in present.values())
        start, end, gap = last, last, "\n\n"
        if found.group(1) in present:
            (start, end), gap = present[found.group(1)].span(), ""
        text = text[:start] + gap + found.group(0) + text[end:]
    return text


def words_by_hand(card: str) -> str:
    """Returns what people wrote in a card: its text without metadata and sections."""
    return _SECTION.sub("", _METADATA.sub("", card)).strip()


def _with_metadata(existing: str, fresh: str) -> str:
    """Returns the existing card with its metadata brought up to date; as it is if they are no YAML mapping."""
    try:
        card = ModelCard(existing, ignore_metadata_errors=True)
        new = ModelCard(fresh, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError):
        return existing
    before = card.data.to_dict()
    for key, value in vars(new.data).items():
        old = card.data.get(key)
        if isinstance(value, list) and isinstance(old, list):
            identity = _IDENTITIES.get(key)
            replaced = [identity(entry) for entry in value] if identity else []
            kept = [entry for entry in old if not identity or identity(entry) not in replaced]
            value = [*kept, *(entry for entry in value if entry not in kept)]
        if value is not None:
            card.data[key] = value
    return existing if card.data.to_dict() == before else str(card)


def _measured(result: EvalResult) -> tuple[object, str]:
    """Returns what a result is of: a task on a data set, and a metric."""
    return result.unique_identifier, result.metric_type


def _pictured(example: Any) -> Any:
    """Returns the file that an example of the gallery shows."""
    return example.get("output", {}).get("url") if isinstance(example, dict) else example


def pictures_of(card: str) -> list[str]:
    """Returns the files beside a card that it shows: pictures in its text, and those of its gallery."""
    named = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card)
    try:
        gallery = ModelCard(card, ignore_metadata_errors=True).data.get("widget") or []
    except (yaml.YAMLError, ValueError):
        gallery = []
    named += [found for example in gallery if isinstance(found := _pictured(example), str)]
    return list(dict.fromkeys(name for name in named if _is_beside(name)))


def _is_beside(name: str) -> bool:
    """Whether it is a picture in the card's own folder, and no address or path to elsewhere."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ":" not in name and not {"..", "."} & set(path.parts)
    return inside and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif")


# What makes an entry of a list another version of the same thing.
_IDENTITIES: dict[str, Callable[[Any], Any]] = {"eval_results": _measured, "widget": _pictured}


def hub_id(name: str | None) -> str | None:
    """Returns `name` if it is a repository's and no path; the Hub refuses cards whose base model is neither."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
