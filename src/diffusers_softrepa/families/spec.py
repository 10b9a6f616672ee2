"""The words in which a denoiser family is described.

A frozen denoiser reads its text stream, shape `(batch, sequence, width)`, in blocks. To give a block K soft tokens is
to insert K rows into that stream at one index, to extend by K whatever else runs along it (masks, rotary rows), and to
cut the same K rows off the stream that the block returns. A `FamilySpec` says where all this is; it holds no code that
touches a module.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

# From a denoiser and the arguments of its call to what stands in the way of soft tokens, or None.
Guard = Callable[[nn.Module, Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class ExtendedArgument:
    """A block argument that runs along the text stream and must grow with it.

    Attributes:
        arg: Name of the block's argument. Absent or None at a call, it is left alone.
        dim: Its sequence dimension.
        fill: `"first"` repeats the row of the first text token (position-free rotary rows); `"identity"` is the
            rotation by nothing, for rotary rows whose first row is no text; a number fills a constant (0.0 keeps a key
            in an additive mask, 1.0 or True in a multiplicative one).
        select: Which part of a tuple (index) or dict (key) grows; the argument itself unless given.
        each: What grows is a tuple of tensors, and every one of them does, as in rotary `(cos, sin)`.
        where: Where the text begins in it: `"tokens"` at row 0, as in the text stream; `"text_last"` behind
            everything else, so that its last rows are those of the text; `"end"` puts the new rows behind all others.
        full: A mask with a row and a column for each token: both grow.
        per_token: It has a row for each token only sometimes (modulation); where it has none, it is left alone.
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
    """Blocks of a denoiser that read text in the same way.

    Attributes:
        path: Attribute of the denoiser: a `ModuleList` of blocks (or of such lists), or one block (or None). Dots lead
            into submodules.
        text: Name of the block argument that carries the text stream, `(batch, sequence, width)`. A tuple is accepted
            at a call (IP-Adapter, image conditions): its first element is the text. Several names are several
            streams, each with a part of every token: the width of a token is the sum of theirs.
        returns: Index of the text stream in the block's output tuple; `"self"` when the block returns one tensor that
            is the stream; None when a block reads text and returns none.
        at: Row of the text stream before which the tokens are inserted, or the name of the block argument that says.
        extended: What else grows.
        stage: Name by which a config picks this group; None for groups whose blocks are numbered layers.
        needs: Name of a boolean attribute of the block, or a predicate on the block; blocks for which it is False, or
            that have no such attribute, read no text.
        seq_dim: Sequence dimension of the text stream: 1, or 0 where the batch comes second or there is none.
        limit: From the denoiser to how many of these blocks read text, counted from the first; all unless given.
        level: `"block"` inserts the tokens into the block's text argument; `"kv"` into the inputs of its text
            projections, for blocks that count the rows of their text before they project them.
        projections: For level `"kv"`: those projections, submodules of the block.
        adjust: Last resort, for what no word above can say: from the bound arguments of a call that already has the
            tokens, and K, to the arguments that must differ.
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
        """Names of the block arguments that carry text."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def reads_text(self, block: nn.Module) -> bool:
        """Whether this block of the group reads text."""
        if callable(self.needs):
            return self.needs(block)
        return self.needs is None or bool(getattr(block, self.needs, False))


@dataclass(frozen=True)
class TimestepArgument:
    """How the pipeline hands the noise level to the denoiser.

    With `t` as the denoiser gets it, the noise level on the 0..1000 scale, 1000 being noise, is `scale * t + offset`,
    or 1000 minus that for a reverse clock.

    Attributes:
        arg: Name of the denoiser's argument; a number, a 0-d tensor, a tensor of shape `(batch,)`, or one with further
            axes for tokens or frames of levels of their own. The noisiest of these counts.
        scale: Factor to the 0..1000 scale on which timestep bins are defined.
        reverse: The clock runs from 0 (noise) to 1000 (image) once it is scaled.
        offset: Added behind the factor.
        per_sample: The first axis is the batch. False for denoisers without a batch: the noisiest of all counts.
    """

    arg: str = "timestep"
    scale: float = 1.0
    reverse: bool = False
    offset: float = 0.0
    per_sample: bool = True

    def level(self, timestep: Tensor) -> Tensor:
        """Returns the noise level on the 0..1000 scale, float32, (batch,) or (1,).

        A timestep that a pipeline rounded to half precision may have slipped under the level that was meant; it is
        lifted by the rounding error of its dtype.
        """
        exact = timestep.to(torch.float32) * self.scale
        slack = exact.abs() * (torch.finfo(timestep.dtype).eps / 2) if timestep.is_floating_point() else 0.0
        level = (1000.0 - exact - self.offset if self.reverse else exact + self.offset) + slack
        if level.ndim > 1 and self.per_sample:
            return level.flatten(1).amax(dim=1)
        return level.reshape(-1) if self.per_sample else level.amax().reshape(1)

    def of_level(self, level: Tensor) -> Tensor:
        """Returns what the denoiser gets for a noise level on the 0..1000 scale; the inverse of `level`."""
        return ((1000.0 - level if self.reverse else level) - self.offset) / self.scale


@dataclass(frozen=True)
class FamilySpec:
    """Everything that soft tokens need to know about one denoiser class.

    Attributes:
        name: The word for this family in configs and errors.
        denoiser: Name of the denoiser's class; subclasses count.
        groups: In the order in which the denoiser runs them.
        width: From the denoiser's config to the width D of the text stream that the blocks read.
        defaults: From the denoiser's config to the fields of a `SoftREPAConfig` that this family uses unless told
            otherwise: `num_tokens`, `num_timestep_bins`, and `num_layers` or `stages`.
        timestep: Where the noise level is and on which scale.
        clock: From the denoiser's config to its timestep, for classes whose pipelines differ; `timestep` unless given.
        guards: What refuses a call that cannot be right with tokens. Each gets the denoiser and the arguments of its
            call by name, and returns a sentence that says what must hold, what came and what to do, or None.
        timed_guards: The same for calls whose tokens depend on the timestep.
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
        """Returns where the noise level is, and on which scale, for a denoiser with this config."""
        return self.timestep if self.clock is None else self.clock(config)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages a config may pick; empty for families whose blocks are numbered layers."""
        return tuple(group.stage for group in self.groups if group.stage is not None)


@dataclass(frozen=True)
class Block:
    """One block of a denoiser that reads text, and the group that says how."""

    path: str
    module: nn.Module
    group: BlockGroup


def text_blocks(denoiser: nn.Module, spec: FamilySpec) -> list[Block]:
    """Returns the blocks of `denoiser` that read text, in running order."""
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
    """Yields the blocks in a list of blocks, or of lists of blocks, by path."""
    if isinstance(module, nn.ModuleList):
        for name, child in module.named_children():
            yield from _leaves(f"{path}.{name}", child)
    elif module is not None:
        yield path, module


def layered_defaults(num_blocks: int, width: int) -> dict[str, Any]:
    """Returns the published recipe for numbered layers: 4 tokens for each of the first 5 blocks, 100 timestep bins.

    Wide denoisers get fewer bins, so that an adapter stays under a million numbers.
    """
    tokens, layers = 4, min(5, num_blocks)
    bins = next(bins for bins in (100, 50, 20, 10, 5, 1) if bins == 1 or layers * width * (tokens + bins) < 1_000_000)
    return {"num_tokens": tokens, "num_layers": layers, "num_timestep_bins": bins}


def inner_width(config: Mapping[str, Any]) -> int:
    """Returns the width of a transformer whose text has the width of its attention."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def named_width(name: str) -> Callable[[Mapping[str, Any]], int]:
    """Returns the width function of a denoiser whose config has it under a name."""
    return lambda config: config[name]


def recipe(width: Callable[[Mapping[str, Any]], int], *counts: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns the defaults function of `layered_defaults`; `counts` name the numbers of blocks in the config."""
    return lambda config: layered_defaults(sum(config[count] for count in counts), width(config))
