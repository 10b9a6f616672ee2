"""The pictures of an evaluation on disk: which there are to be, which are there, and what they were drawn with.

    output_dir/manifest.json                    what they were drawn with, and a line for each picture
    output_dir/images/SETTING/PROMPT-SEED.png   a picture; whole or not there at all

A picture's noise comes from `generator_seed(prompt id, seed)`: the same in every setting, another for each prompt.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor, nn

from ..files import UnreadableJSON, read_json, whole_file, write_whole
from ..quoting import one_line, quoted
from .prompts import Prompt
from .settings import Setting, loaded_adapters

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_SAMPLES = 8  # of each parameter of the pipeline, to tell whether weights have changed


@dataclass(frozen=True)
class Picture:
    """One picture of an evaluation: setting, prompt and seed by their place in its lists."""

    setting: int
    prompt: int
    seed: int


class Gallery:
    """The pictures of an evaluation.

    Args:
        output_dir: Their folder.
        settings: What is compared.
        prompts: What is drawn.
        seeds: How often.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        settings: Sequence[Setting],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
    ) -> None:
        self.folder = Path(output_dir)
        self.settings, self.prompts, self.seeds = settings, prompts, seeds

    @property
    def pictures(self) -> list[Picture]:
        """All of them, setting by setting."""
        return [
            Picture(setting, prompt, seed)
            for setting in range(len(self.settings))
            for prompt in range(len(self.prompts))
            for seed in range(len(self.seeds))
        ]

    def missing(self) -> list[Picture]:
        """Returns the pictures that are still to be drawn."""
        return [picture for picture in self.pictures if not self.path(picture).is_file()]

    def path(self, picture: Picture) -> Path:
        """Returns where a picture is."""
        name = f"{_safe(self.prompts[picture.prompt].id)}-{self.seeds[picture.seed]}.png"
        return self.folder / "images" / _safe(self.settings[picture.setting].label) / name

    def generator_seed(self, picture: Picture) -> int:
        """Returns what a picture's generator starts from."""
        return generator_seed(self.prompts[picture.prompt].id, self.seeds[picture.seed])

    def save(self, picture: Picture, image: Image.Image) -> None:
        """Saves a picture, whole or not at all."""
        path = self.path(picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            image.save(file, format="PNG")

    def open(self, picture: Picture) -> Image.Image:
        """Returns a picture in RGB."""
        with Image.open(self.path(picture)) as file:
            return file.convert("RGB")

    def settle(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Writes down what the pictures are drawn with. Settings, prompts and seeds may come to those of earlier runs.

        Raises:
            ValueError: Pictures that are there were drawn with something else.
        """
        path = self.folder / MANIFEST_NAME
        old = _read_manifest(path) if path.is_file() else None
        new = self._manifest(pipe, arguments)
        if old is not None:
            changed = _changes(old, new)
            if changed:
                raise ValueError(
                    f"{self.folder} holds pictures drawn with something else: {'; '.join(changed)}; give another "
                    "output_dir, or delete that folder to draw them again"
                )
            new["settings"] = old["settings"] | new["settings"]
            new["prompts"] = old["prompts"] | new["prompts"]
            files = {entry["file"] for entry in new["pictures"]}
            new["pictures"] = [entry for entry in old["pictures"] if entry["file"] not in files] + new["pictures"]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(new, indent=1) + "\n")

    def _manifest(self, pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "pipeline": _pipeline_facts(pipe),
            "arguments": {name: _described(value, name) for name, value in sorted(arguments.items())},
            "settings": {setting.label: _setting_facts(pipe, setting) for setting in self.settings},
            "prompts": {prompt.id: prompt.text for prompt in self.prompts},
            "pictures": [
                {
                    "file": self.path(picture).relative_to(self.folder).as_posix(),
                    "setting": self.settings[picture.setting].label,
                    "prompt": self.prompts[picture.prompt].id,
                    "seed": self.seeds[picture.seed],
                    "generator_seed": self.generator_seed(picture),
                }
                for picture in self.pictures
            ],
        }


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of earlier runs.

    Raises:
        ValueError: The file is none; the pictures beside it may be of anything.
    """
    advice = "give another output_dir, or delete that folder to draw its pictures again"
    try:
        found = read_json(path, max_bytes=1 << 30, allow_nonfinite=True)
    except UnreadableJSON as error:
        raise ValueError(f"{error}; {advice}") from error
    parts = ("pipeline", "arguments", "settings", "prompts")
    mappings = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in parts)
    pictures = found.get("pictures") if mappings else None
    named = isinstance(pictures, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) for entry in pictures
    )
    if not named or found.get("format") != _FORMAT:
        raise ValueError(f"{path} is no manifest of an evaluation that this version reads: {quoted(found)}; {advice}")
    return cast(dict[str, Any], found)


def generator_seed(prompt_id: str, seed: int) -> int:
    """Returns what the generator of a picture starts from, 0..2^32 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:4], "big")


def _safe(name: str) -> str:
    """Returns a name that a file can have, different for different names."""
    safe = quote(name, safe=" +:,='") if os.name == "posix" else quote(name, safe=" +,='")
    safe = safe if safe.strip(". ") else safe.replace(".", "%2E").replace(" ", "%20")
    return safe if len(safe) <= 120 else f"{safe[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns what differs between two manifests among that which both speak of."""
    found = []
    for part in ("pipeline", "arguments"):
        for name in sorted(old[part].keys() | new[part].keys()):
            found += _change(name, old[part].get(name), new[part].get(name))
    for part in ("settings", "prompts"):
        for name in old[part].keys() & new[part].keys():
            found += _change(f"{part[:-1]} {name!r}", old[part][name], new[part][name])
    return found


def _change(name: str, old: Any, new: Any) -> list[str]:
    return [] if old == new else [f"{one_line(name, 80)} was {quoted(old, 120)}, is {quoted(new, 120)}"]


def _pipeline_facts(pipe: Any) -> dict[str, Any]:
    scheduler = getattr(pipe, "scheduler", None)
    facts: dict[str, Any] = {"class": type(pipe).__name__}
    if scheduler is not None:
        config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
        facts["scheduler"] = type(scheduler).__name__
        facts |= {f"scheduler.{name}": _described(value, name) for name, value in sorted(config.items())}
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return facts | {f"weights of {name}": _weights_digest(part) for name, part in sorted(parts.items())}


def _weights_digest(module: nn.Module) -> str:
    """Returns a digest of a few numbers of each parameter; those that offloading keeps elsewhere do not count."""
    samples: dict[torch.device, list[Tensor]] = {}
    for parameter in module.parameters():
        flat = parameter.detach().flatten()
        if flat.device.type != "meta" and flat.numel():
            samples.setdefault(flat.device, []).append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float())
    digest = hashlib.sha256()
    for parts in samples.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _setting_facts(pipe: Any, setting: Setting) -> dict[str, Any]:
    adapters = loaded_adapters(pipe)
    facts = {}
    for name, weight in setting.weights.items():
        assert adapters is not None  # checked when the settings were made
        tensors = adapters[name].tokens.state_dict()
        facts[name] = {"weight": weight, "tokens": _digest(torch.cat([one.flatten() for one in tensors.values()]))}
    return facts


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def _described(value: Any, name: str) -> Any:
    """Returns what JSON can hold of an argument, so that a change shows."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _described(entry, name) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_described(entry, name) for entry in value]
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {_digest(value)}"
    if isinstance(value, torch.dtype | torch.device | os.PathLike):
        return str(value)
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "tolist"):  # numpy's
        return _described(value.tolist(), name)
    raise TypeError(f"evaluate cannot tell later whether {name} has changed: it is a {type(value).__name__}")
