"""A tiny random denoiser of every supported class, called as its pipeline calls it.

A specimen is described in a few lines and added to `SPECIMENS` by `add`; the laws of `test_family_laws.py` hold for
all of them. Random inputs depend on their name alone, so two calls differ only in what they were asked to differ in.
"""

import importlib
import importlib.util
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusers_softrepa import SoftREPAConfig, add_softrepa, family_of, softrepa_parameters
from diffusers_softrepa.compat import DIFFUSERS
from diffusers_softrepa.families import Block, text_blocks

K = 4  # soft tokens in every law
LENGTH = 7  # rows of text
VALID = 5  # of them not masked, where a mask is given
ROOMS = ("zoo_unet", "zoo_dual", "zoo_joint", "zoo_cross", "zoo_wan", "zoo_video")

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Specimen:
    """One denoiser class under test.

    Attributes:
        name: Its word in test ids.
        kind: Name of the class in diffusers.
        config: Arguments of a tiny one.
        inputs: From batch and rows of text to the arguments of one call, timestep left out.
        text: Input that carries the text.
        mask: From batch, rows of text and how many of them count to the arguments that mask the rest; None where the
            class takes no mask.
        leaky: Why what a masked row of text holds does matter to this class, even without tokens.
        positioned: Why a text that is longer by K rows is not what K tokens are: text has positions, or the like.
        front: Rows of the stream before the text that was given.
        checkpoints: Whether the class supports gradient checkpointing.
        checkpointing: The function that it is given for that; its own default unless given.
        upstream: A bug of the class itself under gradient checkpointing, for as long as it is there.
        levels: Timesteps of one sample, for classes that take one for each frame or token.
        drawn: Rows of the picture at the end of a prediction that has a row for each token of the sequence.
        prepare: Changes a fresh denoiser.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    inputs: Callable[[int, int], Inputs]
    text: str = "encoder_hidden_states"
    mask: Callable[[int, int, int], Inputs] | None = None
    leaky: str | None = None
    positioned: str | None = None
    front: int = 0
    checkpoints: bool = True
    checkpointing: Callable[..., Any] | None = None
    upstream: str | None = None
    levels: int | None = None
    drawn: int | None = None
    prepare: Callable[[Any], None] | None = None

    def denoiser(self) -> Any:
        """Returns a frozen one, equal at each call; nothing in it is zero that a trained one would have learned."""
        if not hasattr(diffusers, self.kind):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.kind}")
        if self.levels is not None and self.kind.startswith("Wan") and Version("0.35") > DIFFUSERS:
            pytest.skip(f"{self.kind} of diffusers {DIFFUSERS} takes one timestep for each sample")
        torch.manual_seed(0)
        try:
            denoiser = getattr(diffusers, self.kind)(**self.config).eval().requires_grad_(False)
        except TypeError as error:
            if Version("0.42") > DIFFUSERS and "unexpected keyword argument" in str(error):
                pytest.skip(f"{self.kind} of diffusers {DIFFUSERS} lacks what the newest has: {error}")
            raise
        for name, parameter in denoiser.named_parameters():
            # Some are memory as it was found: pad tokens, and what holds numbers of any size.
            found = name.endswith("pad_token") or not parameter.any() or not parameter.abs().max() < 100
            if found:
                parameter.normal_(0.0, 0.1)
        if self.prepare is not None:
            self.prepare(denoiser)
        return denoiser

    def masked(self, batch: int = 2, valid: int = VALID) -> Inputs:
        """Returns the arguments of one call in which only the first rows of text count."""
        assert self.mask is not None
        return {**self.inputs(batch, LENGTH), **self.mask(batch, LENGTH, valid)}

    def call(self, denoiser: nn.Module, inputs: Inputs, level: float | Tensor = 500.0) -> Tensor:
        """Returns the prediction; `level` is the noise on the 0..1000 scale, one for all or (batch,).

        Of several levels for each sample it is the last, and the others are lower.
        """
        clock = family_of(denoiser).timestep_of(denoiser.config)
        batch = inputs.get("batch", 2)
        noisiest = torch.as_tensor(level, dtype=torch.float32).expand(batch)
        several = self.levels is not None
        timestep = clock.of_level(noisiest[:, None] * torch.linspace(0, 1, self.levels) if several else noisiest)
        if self.kind == "QwenImageTransformer2DModel" and Version("0.37") > DIFFUSERS:
            inputs = {**inputs, "txt_seq_lens": [inputs["encoder_hidden_states"].shape[1]] * batch}
        output = denoiser(**{k: v for k, v in inputs.items() if k != "batch"}, **{clock.arg: timestep})
        return _flat(output if self.drawn is None else _first(output)[:, -self.drawn :])


SPECIMENS: dict[str, Specimen] = {}


def add(specimen: Specimen) -> Specimen:
    """Adds a specimen to the zoo."""
    assert specimen.name not in SPECIMENS, specimen.name
    SPECIMENS[specimen.name] = specimen
    return specimen


def everything() -> list[Specimen]:
    """Returns all specimens of all rooms of the zoo."""
    for room in ROOMS:
        if importlib.util.find_spec(room) is not None:
            importlib.import_module(room)
    return list(SPECIMENS.values())


def noise(name: str, *shape: int) -> Tensor:
    """Returns normal noise that depends on the name and the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def text(batch: int, length: int, width: int, name: str = "text") -> Tensor:
    """Returns text (batch, length, width) whose last rows are the same for every length.

    What a text of K rows more has in front is the same for each sample, as soft tokens are.
    """
    rows = noise(name, batch, LENGTH + K, width)
    rows[:, :K] = rows[:1, :K]
    return rows[:, LENGTH + K - length :].clone()


def ones_then_zeros(batch: int, length: int, valid: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Returns a mask (batch, length) in which the first `valid` rows count."""
    return (torch.arange(length) < valid).to(dtype).expand(batch, length).clone()


def grid(height: int, width: int, axes: int = 3) -> Tensor:
    """Returns position ids (height * width, axes) of an image, row and column last but for a further axis."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.flatten(0, 1)


def everywhere(denoiser: nn.Module, **fields: Any) -> SoftREPAConfig:
    """A config that gives tokens as large as text to every block that reads text."""
    blocks = text_blocks(denoiser, family_of(denoiser))
    stages = list(dict.fromkeys(block.group.stage for block in blocks if block.group.stage is not None))
    layers = {"stages": stages} if stages else {"num_layers": len(blocks)}
    settings = {"num_tokens": K, "num_timestep_bins": 10, "init_std": 1.0, **layers, **fields}
    return SoftREPAConfig.for_denoiser(denoiser, **settings)


def with_tokens(specimen: Specimen, **fields: Any) -> Any:
    """Returns a denoiser with tokens in every block that reads text; equal at each call."""
    denoiser = specimen.denoiser()
    add_softrepa(denoiser, everywhere(denoiser, **fields), generator=torch.Generator().manual_seed(1))
    return denoiser


def blocks_of(denoiser: nn.Module) -> list[Block]:
    """Returns the blocks that read text."""
    return text_blocks(denoiser, family_of(denoiser))


def keywords_too(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A checkpointing function that takes what the default one does not."""
    return checkpoint(block, *args, use_reentrant=False, **kwargs)


def fill_tokens(denoiser: nn.Module, value: float | Tensor) -> None:
    """Writes the tokens of an adapter without timestep bins."""
    with torch.no_grad():
        softrepa_parameters(denoiser)["tokens"].copy_(torch.as_tensor(value))


def hide_keys_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Patches attention; returns a list of how many keys of a sample each call was kept from."""
    hidden: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def without(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        soft = key.isnan().any(dim=-1).any(dim=-2)  # (batch, keys)
        if soft.any():
            hidden.extend(soft.sum(dim=-1).unique().tolist())
            if kwargs.pop("is_causal", False):
                attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
            keep = ~soft[:, None, None]
            if attn_mask is None or attn_mask.dtype == torch.bool:
                attn_mask = keep if attn_mask is None else keep & attn_mask
            else:
                attn_mask = attn_mask.masked_fill(~keep, float("-inf"))
            key, value = key.nan_to_num(0.0), value.nan_to_num(0.0)
        return attend(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without)
    return hidden


def _first(output: Any) -> Tensor:
    return next(_tensors(output))


def _flat(output: Any) -> Tensor:
    """Returns all numbers of what a denoiser returned."""
    return torch.cat([tensor.flatten() for tensor in _tensors(output)])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
