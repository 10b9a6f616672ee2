"""What an adapter is, in numbers and words: the content of `adapter_config.json`.

With K tokens for each of L layers, B timestep bins and width D an adapter holds `L*K*D + B*L*D` numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from peft import PeftConfig
from torch import nn

from .families import FamilySpec, family_of, text_blocks

PEFT_TYPE = "SOFTREPA"

Init = Literal["normal", "text"]


@dataclass
class SoftREPAConfig(PeftConfig):
    """Configuration of one soft-token adapter. Make it with `SoftREPAConfig.for_denoiser`.

    Inherits PEFT's `base_model_name_or_path`, `revision` and `inference_mode`; the adapter is not a PEFT tuner.

    Attributes:
        family: Name of the denoiser family, e.g. `"sd3"`.
        token_dim: Width D of the text stream that the denoiser's blocks read.
        num_tokens: Soft tokens per layer, K.
        num_layers: Layers L that have tokens of their own: the first L text blocks. 1 where stages share one layer.
        stages: For UNets: the stages whose blocks see the tokens. None elsewhere.
        num_timestep_bins: Equal stretches B of the 0..1000 timestep scale with a learned offset each; None for none.
        num_banks: Sets of tokens kept side by side. Sampling uses the first; methods that learn a second set from
            mismatched pairs keep it in the second.
        init: `"normal"` draws tokens from N(0, init_std); `"text"` starts from text embeddings plus that noise, so
            that no two tokens are equal.
        init_std: Standard deviation of the initial noise.

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
        super().__post_init__()
        if self.peft_type != PEFT_TYPE:
            raise ValueError(f"a SoftREPA config needs peft_type {PEFT_TYPE!r}, but it is {self.peft_type!r}")
        if not self.family:
            raise ValueError("a SoftREPA config needs a family; make it with SoftREPAConfig.for_denoiser(denoiser)")
        if self.init not in get_args(Init):
            raise ValueError(f"init must be one of {get_args(Init)}, but it is {self.init!r}")
        for name in ("token_dim", "num_tokens", "num_layers", "num_banks"):
            _check_count(name, getattr(self, name))
        if self.num_timestep_bins is not None:
            _check_count("num_timestep_bins", self.num_timestep_bins)
        if self.stages is not None:
            if isinstance(self.stages, str) or not all(isinstance(stage, str) for stage in self.stages):
                raise ValueError(f"stages must be a list of names, such as ['down', 'mid'], but is {self.stages!r}")
            self.stages = list(self.stages)
        if not (isinstance(self.init_std, int | float) and math.isfinite(self.init_std) and self.init_std > 0):
            raise ValueError(f"init_std must be a positive number, but it is {self.init_std!r}")

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
        """Returns the config for a denoiser: the published settings of its family, and yours where given.

        Args:
            denoiser: The frozen model, e.g. `pipe.transformer` or `pipe.unet`.
            num_tokens: Tokens per layer.
            num_layers: How many of the first text blocks get tokens, for families with numbered layers.
            stages: Which of `"down"`, `"mid"`, `"up"` see the tokens, for UNets.
            num_timestep_bins: Number of bins, or None for tokens that do not depend on the timestep.
            **fields: Any other field of the config.

        Raises:
            ValueError: The denoiser's class is not supported, or a value does not fit it.
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
        """Returns the config that `to_dict` described.

        Raises:
            ValueError: It belongs to another method, or holds a field that this version does not know.
        """
        if values.get("peft_type") != PEFT_TYPE:
            raise ValueError(
                f"a SoftREPA adapter has peft_type {PEFT_TYPE!r} in its config, but this one has "
                f"{values.get('peft_type')!r}; load it with the library that wrote it"
            )
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"the adapter config holds fields that this version does not know: {unknown}; "
                "upgrade diffusers-softrepa, or remove them if they were added by hand"
            )
        return cls(**values)

    @classmethod
    def from_peft_type(cls, **values: Any) -> "SoftREPAConfig":
        """PEFT's hook of `from_pretrained`: reads strictly instead of dropping what it does not know."""
        return cls.from_dict(values)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's tensors: `tokens` (L, K, D) and, with bins, `timestep_tokens` (B, L, D).

        With several banks each has a leading bank axis.
        """
        banks = () if self.num_banks == 1 else (self.num_banks,)
        shapes = {"tokens": (*banks, self.num_layers, self.num_tokens, self.token_dim)}
        if self.num_timestep_bins is not None:
            shapes["timestep_tokens"] = (*banks, self.num_timestep_bins, self.num_layers, self.token_dim)
        return shapes

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def layers_of(denoiser: nn.Module, config: SoftREPAConfig) -> dict[str, int]:
    """Returns which layer of tokens each block reads: `{block path: layer index}` in running order.

    Raises:
        ValueError: The config does not fit the denoiser: family, width, number of layers, stages.
    """
    spec = family_of(denoiser)
    kind = type(denoiser).__name__
    if config.family != spec.name:
        raise ValueError(
            f"the adapter was made for family {config.family!r}, but {kind} is of family {spec.name!r}; "
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
        raise ValueError(f"family {spec.name!r} has numbered layers, not stages; give num_layers, not {config.stages}")
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
        raise ValueError(f"stages must name some of {spec.stages}, but they are {config.stages}")
    blocks = text_blocks(denoiser, spec)
    silent = set(chosen) - {block.group.stage for block in blocks}
    if silent:
        raise ValueError(
            f"no block in the stages {sorted(silent)} of this {type(denoiser).__name__} reads text; leave them out"
        )
    return {block.path: 0 for block in blocks if block.group.stage in chosen}


def _settings(denoiser: nn.Module) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], denoiser.config)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but it is {value!r}")
