"""Dataclasses that describe a denoiser family as data.

A frozen denoiser reads its text stream, shape `(batch, sequence, width)`, in blocks. Giving a block K soft tokens
means to insert K rows into that stream at one index, to extend by K every other argument that has a row or column per
text row (masks, rotary embeddings), and to cut the K rows off the stream that the block returns. A `FamilySpec` says
which arguments these are. It contains no code that changes a module.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Maps a denoiser and the arguments of its call to the reason why soft tokens cannot be used in the call, or to None.
Guard = Callable[[nn.Module, Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class ExtendedArgument:
    """A block argument with a row or column per text row, which must be extended when soft tokens are inserted.

    Attributes:
        arg: Name of the block argument. It is not changed in calls that omit it or pass None.
        dim: Dimension of the argument that counts text rows.
        fill: Values of the new rows. `"first"` copies the row of the first text token, which suits rotary embeddings
            without text positions. `"identity"` is a rotary embedding that rotates by zero, for rotary embeddings
            whose first row is not text. A number is a constant: in an additive mask 0.0 keeps a key, in a
            multiplicative mask 1.0 does. Defaults to `"first"`.
        each: Whether the argument is a tuple of tensors that must all be extended, as in rotary `(cos, sin)`. Defaults
            to False.
        select: Index or key of the part of a tuple or dict that must be extended. Defaults to None: the argument
            itself.
        where: Position of the text in the argument. `"tokens"`: the text starts at row 0, and the new rows are
            inserted where the tokens are inserted into the text stream. `"text_last"`: the text is in the last rows.
            `"end"`: the new rows are appended after all others. Defaults to `"tokens"`.
        full: Whether the argument is a mask with a row and a column per token, both of which must be extended.
            Defaults to False.
        per_token: Whether the argument has a row per token in some calls only, as modulation has; it is not changed in
            the other calls. Defaults to False.
    """

    arg: str
    dim: int
    fill: Literal["first", "identity"] | float = "first"
    each: bool = False
    select: int | str | None = None
    where: Literal["tokens", "text_last", "end"] = "tokens"
    full: bool = False
    per_token: bool = False


@dataclass(frozen=True)
class BlockGroup:
    """A group of blocks of a denoiser that read text in the same way.

    Attributes:
        path: Attribute of the denoiser that holds the blocks: a `ModuleList` of blocks or of such lists, or a single
            block, which may be None. Dots separate the names of submodules.
        text: Name of the block argument that is the text stream, `(batch, sequence, width)`. If a call passes a tuple
            there (IP-Adapter, image conditions), its first element is the text stream. Several names mean several
            text streams; each gets a part of every token, and the width of a token is the sum of their widths.
        returns: Index of the text stream in the output tuple of the block; `"self"` if the block returns one tensor
            that is the stream; None if the block does not return the text. Defaults to None.
        at: Row of the text stream before which the tokens are inserted, or the name of the block argument that holds
            this number. Defaults to 0.
        extended: Other block arguments that must be extended by the tokens. Defaults to none.
        stage: Name by which `SoftREPAConfig.stages` selects this group. Defaults to None, for groups whose blocks are
            numbered layers.
        needs: Name of a boolean attribute of the block, or a predicate on the block, that is true for blocks that read
            text. A block without the attribute does not read text. Defaults to None: all blocks read text.
        seq_dim: Sequence dimension of the text stream: 1, or 0 if the batch is the second dimension or there is no
            batch dimension. Defaults to 1.
        limit: Maps the denoiser to the number of these blocks that read text, counted from the first. Defaults to
            None: all blocks.
        level: `"block"` inserts the tokens into the text argument of the block. `"kv"` inserts them into the inputs of
            the text projections, for blocks that count the text rows before they project them. Defaults to `"block"`.
        projections: For level `"kv"`, paths of the text projections within the block. Defaults to
            `("attn2.to_k", "attn2.to_v")`.
        adjust: For changes that none of the other fields can express: maps the arguments of a call that contains the
            tokens already, and K, to the arguments that must be replaced. Defaults to None.
    """

    path: str
    text: str | tuple[str, ...]
    returns: int | Literal["self"] | None = None
    at: int | str = 0
    extended: tuple[ExtendedArgument, ...] = ()
    stage: str | None = None
    needs: str | Callable[[nn.Module], bool] | None = None
    seq_dim: Literal[0, 1] = 1
    limit: Callable[[nn.Module], int] | None = None
    level: Literal["block", "kv"] = "block"
    projections: tuple[str, ...] = ("attn2.to_k", "attn2.to_v")
    adjust: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the block arguments that are text streams."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def reads_text(self, block: nn.Module) -> bool:
        """Returns whether a block of this group reads text."""
        if callable(self.needs):
            return self.needs(block)
        return self.needs is None or bool(getattr(block, self.needs, False))


@dataclass(frozen=True)
class TimestepArgument:
    """The argument in which a denoiser gets the noise level, and its scale.

    Timestep bins are defined on the 0..1000 scale, on which 1000 is pure noise. If the denoiser gets `t`, the noise
    level on that scale is `scale * t + offset`, or 1000 minus that if `reverse` is set.

    Attributes:
        arg: Name of the denoiser argument. Its value is a number, a 0-d tensor, a tensor of shape `(batch,)`, or one
            with further dimensions for tokens or frames that have noise levels of their own; the highest noise level
            of a sample is used. Defaults to `"timestep"`.
        scale: Factor that brings the value to the 0..1000 scale. Defaults to 1.
        reverse: Whether the scaled value runs from 0 (noise) to 1000 (image). Defaults to False.
        offset: Number added after scaling. Defaults to 0.
        per_sample: Whether the first dimension is the batch. If False, the denoiser has no batch dimension, and the
            highest noise level of all rows is used. Defaults to True.
    """

    arg: str = "timestep"
    scale: float = 1.0
    reverse: bool = False
    offset: float = 0.0
    per_sample: bool = True

    def level(self, timestep: Tensor) -> Tensor:
        """Returns the noise level on the 0..1000 scale, (batch,) or (1,) float32.

        Rounding a timestep to half precision may move it below the level that was meant, into the bin below. The
        rounding error of the dtype is therefore added.

        Args:
            timestep: Value that the denoiser gets, of any shape and dtype.
        """
        exact = timestep.to(torch.float32) * self.scale
        slack = exact.abs() * (torch.finfo(timestep.dtype).eps / 2) if timestep.is_floating_point() else 0.0
        level = (1000.0 - exact - self.offset if self.reverse else exact + self.offset) + slack
        if level.ndim > 1 and self.per_sample:
            return level.flatten(1).amax(dim=1)
        return level.reshape(-1) if self.per_sample else level.amax().reshape(1)

    def of_level(self, level: Tensor) -> Tensor:
        """Returns the value that the denoiser gets for a noise level on the 0..1000 scale; the inverse of `level`.

        Args:
            level: Noise level, of any shape.
        """
        return ((1000.0 - level if self.reverse else level) - self.offset) / self.scale


@dataclass(frozen=True)
class FamilySpec:
    """Description of one denoiser class for soft tokens.

    Attributes:
        name: Name of the family in configurations and error messages.
        denoiser: Name of the denoiser class. The spec also applies to its subclasses.
        groups: Groups of blocks that read text, in the order in which the denoiser runs them.
        width: Maps the config of the denoiser to the width D of the text stream that the blocks read.
        defaults: Maps the config of the denoiser to the default fields of `SoftREPAConfig.for_denoiser`: `num_tokens`,
            `num_timestep_bins`, and `num_layers` or `stages`.
        timestep: The argument of the noise level, and its scale. Defaults to `timestep` from 1000 (noise) to 0.
        clock: Maps the config of the denoiser to its `TimestepArgument`, for classes whose checkpoints differ in it.
            Defaults to None: `timestep` is used.
        guards: Checks of each denoiser call that has active soft tokens. A guard gets the denoiser and the arguments
            of the call by name, and returns an error message, or None if the call is right. Defaults to none.
        timed_guards: Guards that are called only if the tokens depend on the timestep. Defaults to none.
    """

    name: str
    denoiser: str
    groups: tuple[BlockGroup, ...]
    width: Callable[[Mapping[str, Any]], int]
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]
    timestep: TimestepArgument = field(default_factory=TimestepArgument)
    clock: Callable[[Mapping[str, Any]], TimestepArgument] | None = None
    guards: tuple[Guard, ...] = ()
    timed_guards: tuple[Guard, ...] = ()

    def timestep_of(self, config: Mapping[str, Any]) -> TimestepArgument:
        """Returns the argument of the noise level, and its scale, for a denoiser with this config."""
        return self.timestep if self.clock is None else self.clock(config)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that a configuration may select; empty for families with numbered layers."""
        return tuple(group.stage for group in self.groups if group.stage is not None)


@dataclass(frozen=True)
class Block:
    """A block of a denoiser that reads text.

    Attributes:
        path: Path of the block within the denoiser.
        module: The block.
        group: The group of the family spec that describes how the block reads text.
    """

    path: str
    module: nn.Module
    group: BlockGroup


def text_blocks(denoiser: nn.Module, spec: FamilySpec) -> list[Block]:
    """Returns the blocks of a denoiser that read text, in the order in which they run.

    Args:
        denoiser: The frozen model.
        spec: Its family spec.
    """
    found = []
    for group in spec.groups:
        container: Any = denoiser
        for name in group.path.split("."):
            container = getattr(container, name)
        blocks = list(_leaves(group.path, container))
        count = len(blocks) if group.limit is None else group.limit(denoiser)
        found += [Block(path, module, group) for path, module in blocks[:count] if group.reads_text(module)]
    return found


def _leaves(path: str, module: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of each block in a block, a list of blocks, or a list of such lists."""
    if isinstance(module, nn.ModuleList):
        for name, child in module.named_children():
            yield from _leaves(f"{path}.{name}", child)
    elif module is not None:
        yield path, module


def layered_defaults(num_blocks: int, width: int) -> dict[str, Any]:
    """Returns the published settings for numbered layers: 4 tokens for each of the first 5 blocks, 100 timestep bins.

    Wide denoisers get fewer bins, so that an adapter has less than a million parameters.

    Args:
        num_blocks: Number of blocks that read text.
        width: Width of the text stream.
    """
    tokens, layers = 4, min(5, num_blocks)
    bins = next(bins for bins in (100, 50, 20, 10, 5, 1) if bins == 1 or layers * width * (tokens + bins) < 1_000_000)
    return {"num_tokens": tokens, "num_layers": layers, "num_timestep_bins": bins}


def inner_width(config: Mapping[str, Any]) -> int:
    """Returns the width of the text stream of a transformer whose text has the width of its attention."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def named_width(name: str) -> Callable[[Mapping[str, Any]], int]:
    """Returns a `FamilySpec.width` function that reads one entry of the config of a denoiser."""
    return lambda config: config[name]


def recipe(width: Callable[[Mapping[str, Any]], int], *counts: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns a `FamilySpec.defaults` function for numbered layers.

    Args:
        width: Maps the config of a denoiser to the width of its text stream.
        *counts: Names of the config entries whose sum is the number of blocks that read text.
    """
    return lambda config: layered_defaults(sum(config[count] for count in counts), width(config))
