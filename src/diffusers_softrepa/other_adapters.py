"""Recognises adapters of other methods by the names of their tensors or files, with the diffusers call for each."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Kind:
    name: str
    call: str
    tensors: re.Pattern[str]
    files: re.Pattern[str]


_KINDS = (
    _Kind(
        "a LoRA",
        "load_lora_weights",
        re.compile(r"(^|[._])lora([._]|$)|(^|\.)(lora_|hada_|lokr_)|\.lora_|lora_(up|down|mid)|\.dora_scale"),
        re.compile(r"pytorch_lora_weights(\.\w+)*\.(safetensors|bin)"),
    ),
    _Kind(
        "an IP-Adapter",
        "load_ip_adapter",
        re.compile(r"^(image_proj|ip_adapter)(\.|$)"),
        re.compile(r"ip[-_]adapter.*\.(safetensors|bin)"),
    ),
    _Kind(
        "a textual inversion",
        "load_textual_inversion",
        re.compile(r"^(emb_params|string_to_param|clip_[lg]|t5|<.*>)$"),
        re.compile(r"learned_embeds(-.*)?\.(safetensors|bin)"),
    ),
)


def other_kind(tensors: Iterable[object] = (), files: Iterable[str] = ()) -> str | None:
    """Returns the kind of an adapter of another method and how to load it, as the end of a sentence.

    Args:
        tensors: Names of its tensors.
        files: Names of the files in its folder.

    Returns:
        For example `"a LoRA; load it with pipe.load_lora_weights(...)"`; None if no known kind has such names.
    """
    names, present = [name for name in tensors if isinstance(name, str)], list(files)
    for kind in _KINDS:
        if any(map(kind.tensors.search, names)) or any(map(kind.files.fullmatch, present)):
            return f"{kind.name}; load it with pipe.{kind.call}(...)"
    return None
