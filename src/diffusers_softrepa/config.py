"""The configuration of an adapter, which is stored as `adapter_config.json`.

With K tokens for each of L layers, B timestep bins and width D an adapter has `L*K*D + B*L*D` parameters.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from peft import PeftConfig
from torch import nn

from .families import FamilySpec, family_of, text_blocks
from .files import UnreadableJSON, read_json
from .hub_ids import hub_id
from .quoting import quoted

PEFT_TYPE = "SOFTREPA"

Init = Literal["normal", "text"]

MAX_CONFIG_BYTES = 1 << 20
_MOST = {
    "token_dim": 1 << 20,
    "num_tokens": 1 << 16,
    "num_layers": 1 << 12,
    "num_banks": 1 << 8,
    "num_timestep_bins": 1 << 16,
}
_LONGEST = {"family": 100, "base_model_name_or_path": 4096, "revision": 255, "task_type": 100, "peft_version": 100}
_MOST_NUMBERS = 1 << 32
_MOST_STD = 1e6


@dataclass
class SoftREPAConfig(PeftConfig):
    """Configuration of one soft-token adapter. `SoftREPAConfig.for_denoiser` creates one that fits a denoiser.

    The class inherits `base_model_name_or_path`, `revision` and `inference_mode` from PEFT's `PeftConfig`. The adapter
    itself is not a PEFT tuner.

    Attributes:
        family: Name of the denoiser family, such as `"sd3"`. Required.
        token_dim: Width D of the text stream that the blocks of the denoiser read. Required.
        num_tokens: Number K of soft tokens per layer. Defaults to 4.
        num_layers: Number L of layers that have tokens of their own: the first L blocks that read text. Defaults to 1,
            which is required for UNets, where all stages share one layer.
        stages: For UNets, the stages whose blocks read the tokens, such as `["down", "mid"]`. None for other families.
        num_timestep_bins: Number B of equal bins of the 0..1000 timestep scale; each bin has a learned offset of the
            tokens. Defaults to None: the tokens do not depend on the timestep.
        num_banks: Number of token sets. Sampling uses the first set. Objectives that train a second set on mismatched
            pairs store it as the second. Defaults to 1.
        init: `"normal"` draws the initial tokens from a normal distribution; `"text"` starts from text embeddings and
            adds the same noise, so that no two tokens are equal. Defaults to `"normal"`.
        init_std: Standard deviation of the initial noise. Defaults to 0.02.

    Raises:
        ValueError: A field is missing or out of range.
    """

    peft_type: str = field(default=PEFT_TYPE)
    family: str = ""
    token_dim: int = 0
    num_tokens: int = 4
    num_layers: int = 1
    stages: list[str] | None = None
    num_timestep_bins: int | None = None
    num_banks: int = 1
    init: Init = "normal"
    init_std: float = 0.02
    peft_version: str | None = None  # a field of PEFT's own since 0.18, which older ones read as well

    def __post_init__(self) -> None:
        if self.peft_type != PEFT_TYPE:
            raise ValueError(f"a SoftREPA config needs peft_type {PEFT_TYPE!r}, but it is {quoted(self.peft_type)}")
        if not self.family:
            raise ValueError("a SoftREPA config needs a family; make it with SoftREPAConfig.for_denoiser(denoiser)")
        if isinstance(self.base_model_name_or_path, os.PathLike):
            self.base_model_name_or_path = os.fspath(self.base_model_name_or_path)
        for name, longest in _LONGEST.items():
            _check_text(name, getattr(self, name), longest)
        super().__post_init__()
        if not isinstance(self.inference_mode, bool):
            raise ValueError(f"inference_mode must be true or false, but it is {quoted(self.inference_mode)}")
        _check_mapping("auto_mapping", self.auto_mapping)
        if not isinstance(self.init, str) or self.init not in get_args(Init):
            raise ValueError(f"init must be one of {get_args(Init)}, but it is {quoted(self.init)}")
        for name, most in _MOST.items():
            if name != "num_timestep_bins" or self.num_timestep_bins is not None:
                _check_count(name, getattr(self, name), most)
        if self.num_parameters > _MOST_NUMBERS:
            raise ValueError(
                f"an adapter may hold {_MOST_NUMBERS:,} numbers, but this config asks for {self.num_parameters:,}"
            )
        if self.stages is not None:
            self.stages = _checked_stages(self.stages)
        if not _is_number(self.init_std) or not 0 < self.init_std <= _MOST_STD:
            raise ValueError(
                f"init_std must be a positive number of at most {_MOST_STD:g}, but it is {quoted(self.init_std)}"
            )

    @classmethod
    def for_denoiser(
        cls,
        denoiser: nn.Module,
        *,
        num_tokens: int | None = None,
        num_layers: int | None = None,
        stages: Sequence[str] | None = None,
        num_timestep_bins: int | Literal["default"] | None = "default",
        **fields: Any,
    ) -> "SoftREPAConfig":
        """Returns a configuration that fits a denoiser, with the published settings of its family as defaults.

        Args:
            denoiser: The frozen model, such as `pipe.transformer` or `pipe.unet`.
            num_tokens: Number of tokens per layer. Defaults to that of the family.
            num_layers: Number of blocks that get tokens, counted from the first block that reads text. Not for UNets.
                Defaults to that of the family.
            stages: For UNets only, which of `"down"`, `"mid"` and `"up"` read the tokens. Defaults to those of the
                family.
            num_timestep_bins: Number of timestep bins, or None for tokens that do not depend on the timestep. Defaults
                to that of the family.
            **fields: Any other field of the configuration.

        Raises:
            ValueError: The class of the denoiser is not supported, or a value does not fit the denoiser.
        """
        spec = family_of(denoiser)
        values = spec.defaults(_settings(denoiser))
        given = {"num_tokens": num_tokens, "num_layers": num_layers, "stages": stages}
        values |= {name: value for name, value in given.items() if value is not None}
        if num_timestep_bins != "default":
            values["num_timestep_bins"] = num_timestep_bins
        config = cls(**{"family": spec.name, "token_dim": spec.width(_settings(denoiser)), **values, **fields})
        layers_of(denoiser, config)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SoftREPAConfig":
        """Returns the configuration that `to_dict` wrote.

        Args:
            values: Fields by name. Unlike PEFT's method, this one refuses unknown fields.

        Raises:
            ValueError: The configuration belongs to another method, or has a field that this version does not know.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a SoftREPA config must be a JSON object, but is {quoted(values)}")
        if values.get("peft_type") != PEFT_TYPE:
            raise ValueError(
                f"a SoftREPA adapter has peft_type {PEFT_TYPE!r} in its config, but this one has "
                f"{quoted(values.get('peft_type'))}; load it with the library that wrote it"
            )
        unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
        if unknown:
            raise ValueError(
                f"the adapter config holds fields that this version does not know: {quoted(unknown, 200)}; "
                "upgrade diffusers-softrepa, or remove them if they were added by hand"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are stored in files.

        `base_model_name_or_path` is stored as None if it is a local path, which is private and has no meaning on
        another machine.
        """
        return {**super().to_dict(), "base_model_name_or_path": hub_id(self.base_model_name_or_path)}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads the fields from a JSON file. PEFT calls it in `from_pretrained`.

        Args:
            path_json_file: Path of the file.
            **kwargs: Not used.

        Raises:
            UnreadableJSON: The file is not a JSON object, or is larger than any configuration.
        """
        found = read_json(path_json_file, max_bytes=MAX_CONFIG_BYTES)
        if not isinstance(found, dict):
            raise UnreadableJSON(f"{path_json_file} must be a JSON object, but is {quoted(found)}")
        return found

    @classmethod
    def from_peft_type(cls, **values: Any) -> "SoftREPAConfig":
        """Returns the configuration with these fields; refuses unknown ones. PEFT calls it in `from_pretrained`."""
        return cls.from_dict(values)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name: `tokens` (L, K, D) and, if there are bins, `timestep_tokens` (B, L, D).

        With several banks both shapes begin with the number of banks.
        """
        banks = () if self.num_banks == 1 else (self.num_banks,)
        shapes = {"tokens": (*banks, self.num_layers, self.num_tokens, self.token_dim)}
        if self.num_timestep_bins is not None:
            shapes["timestep_tokens"] = (*banks, self.num_timestep_bins, self.num_layers, self.token_dim)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the adapter."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def layers_of(denoiser: nn.Module, config: SoftREPAConfig) -> dict[str, int]:
    """Returns the index of the token layer that each block reads, by block path, in the order the blocks run.

    Args:
        denoiser: The frozen model.
        config: Configuration of an adapter.

    Raises:
        ValueError: Family, width, number of layers or stages of the configuration do not fit the denoiser.
    """
    spec = family_of(denoiser)
    kind = type(denoiser).__name__
    if config.family != spec.name:
        raise ValueError(
            f"the adapter was made for family {quoted(config.family)}, but {kind} is of family {spec.name!r}; "
            "load it into a pipeline of its own family"
        )
    width = spec.width(_settings(denoiser))
    if config.token_dim != width:
        raise ValueError(
            f"soft tokens have width {config.token_dim} but the blocks of this {kind} read {width}; the adapter "
            "belongs to another model size; make a config with SoftREPAConfig.for_denoiser(denoiser)"
        )
    return _stage_layers(denoiser, config, spec) if spec.stages else _numbered_layers(denoiser, config, spec)


def _numbered_layers(denoiser: nn.Module, config: SoftREPAConfig, spec: FamilySpec) -> dict[str, int]:
    if config.stages is not None:
        raise ValueError(
            f"family {spec.name!r} has numbered layers, not stages; give num_layers, not {quoted(config.stages)}"
        )
    paths = [block.path for block in text_blocks(denoiser, spec)]
    if config.num_layers > len(paths):
        raise ValueError(
            f"the adapter has tokens for {config.num_layers} layers, but this {type(denoiser).__name__} has "
            f"{len(paths)} blocks that read text; use num_layers <= {len(paths)}"
        )
    return {path: layer for layer, path in enumerate(paths[: config.num_layers])}


def _stage_layers(denoiser: nn.Module, config: SoftREPAConfig, spec: FamilySpec) -> dict[str, int]:
    if config.num_layers != 1:
        raise ValueError(f"the stages of family {spec.name!r} share one layer of tokens, not {config.num_layers}")
    chosen = config.stages or []
    if not chosen or not set(chosen) <= set(spec.stages):
        raise ValueError(f"stages must name some of {spec.stages}, but they are {quoted(config.stages)}")
    blocks = text_blocks(denoiser, spec)
    silent = set(chosen) - {block.group.stage for block in blocks}
    if silent:
        raise ValueError(
            f"no block in the stages {sorted(silent)} of this {type(denoiser).__name__} reads text; leave them out"
        )
    return {block.path: 0 for block in blocks if block.group.stage in chosen}


def _settings(denoiser: nn.Module) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], denoiser.config)


def _check_count(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number of at least 1 and at most {most}, but it is {quoted(value)}")


def _check_text(name: str, value: Any, longest: int) -> None:
    if value is None and name != "family":
        return
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        raise ValueError(f"{name} must be a text of at most {longest} printable characters, but it is {quoted(value)}")


def _check_mapping(name: str, value: Any) -> None:
    fits = value is None or (
        isinstance(value, dict)
        and len(value) <= 16
        and all(isinstance(key, str) and isinstance(entry, str | None) for key, entry in value.items())
        and all(len(text) <= 255 for pair in value.items() for text in pair if text is not None)
    )
    if not fits:
        raise ValueError(f"{name} must be a small object of texts or null, but it is {quoted(value)}")


def _checked_stages(stages: Any) -> list[str]:
    names = isinstance(stages, list | tuple) and len(stages) <= 16 and all(isinstance(one, str) for one in stages)
    if not names or not all(len(one) <= 100 for one in stages):
        raise ValueError(f"stages must be a list of names, such as ['down', 'mid'], but is {quoted(stages)}")
    return list(stages)


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number that fits float64; an integer in JSON may have any number of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300
