"""The images of an evaluation on disk: which are asked for, which are there, and what they were drawn with.

    output_dir/manifest.json                    what the images were drawn with, and an entry for each image
    output_dir/images/SETTING/PROMPT-SEED.png   an image, with what it was drawn with; written whole or not at all

The noise of an image comes from `generator_seed(prompt id, seed)`: the same in every setting, another for each prompt.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from ..files import UnreadableJSON, check_places, read_json, write_whole
from ..fingerprints import fingerprint, tensor_fingerprint, weights_fingerprint
from ..pipeline import softrepa_parameters
from ..quoting import one_line, quoted
from .prompts import Prompt
from .provenance import CutImage, facts_of, image_fingerprint, save_with_facts
from .settings import Setting

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class ImageKey:
    """Names one image of a gallery: the positions of its setting, prompt and seed in the gallery's lists."""

    setting: int
    prompt: int
    seed: int


class Gallery:
    """The images of an evaluation: one for each setting, prompt and seed.

    Args:
        output_dir: Folder that holds them.
        settings: The settings that are compared.
        prompts: The prompts that are drawn.
        seeds: The seeds that each prompt is drawn with.
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
        self._drawn_with: dict[str, Any] = {}

    @property
    def keys(self) -> list[ImageKey]:
        """The keys of all images, setting by setting."""
        return [
            ImageKey(setting, prompt, seed)
            for setting in range(len(self.settings))
            for prompt in range(len(self.prompts))
            for seed in range(len(self.seeds))
        ]

    def missing(self) -> list[ImageKey]:
        """Returns the keys of the images that are not on disk."""
        return [key for key in self.keys if not self.path(key).is_file()]

    def path(self, key: ImageKey) -> Path:
        """Returns the file of an image."""
        name = f"{_safe(self.prompts[key.prompt].id)}-{self.seeds[key.seed]}.png"
        return self.folder / "images" / _safe(self.settings[key.setting].label) / name

    def generator_seed(self, key: ImageKey) -> int:
        """Returns the seed of an image's generator."""
        return generator_seed(self.prompts[key.prompt].id, self.seeds[key.seed])

    def save(self, key: ImageKey, image: Image.Image) -> None:
        """Saves an image with what it was drawn with, whole or not at all. Call `describe` first."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_with_facts(image, path, self._facts(key))

    def open(self, key: ImageKey) -> Image.Image:
        """Returns an image in RGB."""
        with Image.open(self.path(key)) as file:
            return file.convert("RGB")

    def describe(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Records what the images are drawn with; nothing is written.

        Args:
            pipe: The pipeline.
            arguments: Arguments of its calls.

        Raises:
            TypeError: An argument has a type whose changes could not be noticed.
        """
        self._drawn_with = self._manifest(pipe, arguments)

    def write_manifest(self) -> None:
        """Checks the images on disk against what `describe` recorded, and writes the manifest.

        Settings, prompts and seeds are added to those of earlier runs that left images. A truncated image is deleted,
        so that it is drawn again.

        Raises:
            ValueError: An image on disk was drawn with something else, was changed, or belongs somewhere else; or the
                folder cannot be written.
        """
        path = self.folder / MANIFEST_NAME
        for folder, names in {path.parent: [path.name], **self._names_by_folder()}.items():
            check_places(folder, names, what="output_dir")
        old = _read_manifest(path) if path.is_file() else None
        new = dict(self._drawn_with)
        if old is not None and any((self.folder / entry["file"]).is_file() for entry in old["images"]):
            changed = _changes(old, new)
            if changed:
                raise ValueError(
                    f"{self.folder} holds images drawn with something else: {'; '.join(changed)}; give another "
                    "output_dir, or delete that folder to draw them again"
                )
            new["settings"] = old["settings"] | new["settings"]
            new["prompts"] = old["prompts"] | new["prompts"]
            files = {entry["file"] for entry in new["images"]}
            new["images"] = [entry for entry in old["images"] if entry["file"] not in files] + new["images"]
        for cut in self._cut_images():
            logger.warning("%s is truncated or damaged and will be drawn again", cut)
            cut.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(new, indent=1) + "\n")

    def _names_by_folder(self) -> dict[Path, list[str]]:
        """Returns the names of all images by folder."""
        found: dict[Path, list[str]] = {}
        for path in map(self.path, self.keys):
            found.setdefault(path.parent, []).append(path.name)
        return found

    def _facts(self, key: ImageKey) -> dict[str, Any]:
        """Returns what one image is drawn with, as its file keeps it."""
        setting, prompt = self.settings[key.setting], self.prompts[key.prompt]
        return {
            "pipeline": self._drawn_with["pipeline"],
            "arguments": self._drawn_with["arguments"],
            "settings": {setting.label: self._drawn_with["settings"][setting.label]},
            "prompts": {prompt.id: prompt.text},
            "seed": self.seeds[key.seed],
            "generator_seed": self.generator_seed(key),
        }

    def _cut_images(self) -> list[Path]:
        """Returns the truncated files, after all others have been checked.

        Raises:
            ValueError: An image was drawn with something else, was changed, or belongs somewhere else.
        """
        cut = []
        for key in self.keys:
            path = self.path(key)
            if not path.is_file():
                continue
            try:
                old = facts_of(path)
            except CutImage:
                cut.append(path)
                continue
            new = self._facts(key)
            if not isinstance(old, dict) or old.keys() != new.keys():
                raise ValueError(
                    f"{path} is not as evaluate drew it: it was changed, replaced, or drawn by something else; delete "
                    "it to have it drawn again"
                )
            changed = _changes(old, new) or [f"{name} of {path.name}" for name in new if old[name] != new[name]]
            if changed:
                raise ValueError(
                    f"{path} was drawn with something else: {'; '.join(changed)}; give another output_dir, or delete "
                    "it to have it drawn again"
                )
        return cut

    def _manifest(self, pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "pipeline": _pipeline_facts(pipe),
            "arguments": {name: _described(value, name) for name, value in sorted(arguments.items())},
            "settings": {setting.label: _setting_facts(pipe, setting) for setting in self.settings},
            "prompts": {prompt.id: prompt.text for prompt in self.prompts},
            "images": [
                {
                    "file": self.path(key).relative_to(self.folder).as_posix(),
                    "setting": self.settings[key.setting].label,
                    "prompt": self.prompts[key.prompt].id,
                    "seed": self.seeds[key.seed],
                    "generator_seed": self.generator_seed(key),
                }
                for key in self.keys
            ],
        }


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of earlier runs.

    Raises:
        ValueError: The file is not a manifest, so the images beside it cannot be trusted.
    """
    advice = "give another output_dir, or delete that folder to draw its images again"
    try:
        found = read_json(path, max_bytes=1 << 30, allow_nonfinite=True)
    except UnreadableJSON as error:
        raise ValueError(f"{error}; {advice}") from error
    parts = ("pipeline", "arguments", "settings", "prompts")
    mappings = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in parts)
    images = found.get("images") if mappings else None
    named = isinstance(images, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) for entry in images
    )
    if not named or found.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a manifest of an evaluation that this version reads: {quoted(found)}; {advice}"
        )
    return cast(dict[str, Any], found)


def generator_seed(prompt_id: str, seed: int) -> int:
    """Returns the seed of the generator of an image, 0..2^32 - 1."""
    return int.from_bytes(sha256(f"{seed}/{prompt_id}".encode()).digest()[:4], "big")


def _safe(name: str) -> str:
    """Returns a valid file name; different names have different file names."""
    safe = quote(name, safe=" +:,='") if os.name == "posix" else quote(name, safe=" +,='")
    safe = safe if safe.strip(". ") else safe.replace(".", "%2E").replace(" ", "%20")
    return safe if len(safe) <= 120 else f"{safe[:80]}-{fingerprint(name)}"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the differences between two manifests in what both contain."""
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
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            facts[f"weights of {name}"] = weights_fingerprint(part)
            facts |= {f"LoRA of {name}": scales} if (scales := _lora_scales(part)) else {}
    return facts


def _lora_scales(module: nn.Module) -> str:
    """Returns which LoRAs of a module act and how strongly; their weights are among those of the module."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    facts = [
        (layer.disable_adapters, list(layer.active_adapters), sorted(getattr(layer, "scaling", {}).items()))
        for layer in layers
    ]
    return fingerprint(repr(facts)) if layers else ""


def _setting_facts(pipe: Any, setting: Setting) -> dict[str, Any]:
    facts = {}
    for name, weight in setting.weights.items():
        tensors = softrepa_parameters(pipe, name)  # of all its denoisers
        tokens = torch.cat([one.flatten() for one in tensors.values()])
        facts[name] = {"weight": _described(weight, name), "tokens": tensor_fingerprint(tokens)}
    return facts


def _described(value: Any, name: str) -> Any:
    """Returns a description of an argument that JSON can hold and that differs where the argument differs."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _described(entry, name) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_described(entry, name) for entry in value]
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {tensor_fingerprint(value)}"
    if isinstance(value, torch.dtype | torch.device | os.PathLike):
        return str(value)
    if isinstance(value, Image.Image):
        return image_fingerprint(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "tolist"):  # numpy's
        return _described(value.tolist(), name)
    raise TypeError(
        f"evaluate must be able to tell later whether {name} has changed, but cannot for a {type(value).__name__}; "
        "give a number, text, list, mapping, tensor, image or function"
    )
