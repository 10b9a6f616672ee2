"""The words in which a denoiser family is described.

A frozen denoiser reads its text stream, shape `(batch, sequence, width)`, in blocks. To give a block K soft tokens is
to insert K rows into that stream at one index, to extend by K whatever else runs along it (masks, rotary rows), and to
cut the same K rows off the stream that the block returns. A `FamilySpec` says where all this is; it holds no code that
touches a module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Side:
    """A block argument that runs along the text stream and must grow with it.

    Attributes:
        arg: Name of the block's argument. Absent or None at a call, it is left alone.
        dim: Its sequence dimension.
        fill: `"first"` repeats the row of the first text token (position-free rotary rows); a number fills a constant
            (0.0 keeps a key in an additive mask, 1.0 or True in a multiplicative one).
        each: The argument is a tuple of tensors and every one of them grows, as in rotary `(cos, sin)`.
    """

    arg: str
    dim: int
    fill: Literal["first"] | float = "first"
    each: bool = False


@dataclass(frozen=True)
class Group:
    """Blocks of a denoiser that read text in the same way.

    Attributes:
        path: Attribute of the denoiser: a `ModuleList` of blocks, or one block (or None).
        text: Name of the block argument that carries the text stream, `(batch, sequence, width)`. A tuple is accepted
            at a call (IP-Adapter): its first element is the text.
        returns: Index of the text stream in the block's output tuple; None when a block reads text and returns none.
        at: Row of the text stream before which the tokens are inserted.
        sides: What else grows.
        stage: Name by which a config picks this group; None for groups whose blocks are numbered layers.
        needs: Name of a boolean attribute of the block; blocks without it, or with it False, read no text.
    """

    path: str
    text: str
    returns: int | None = None
    at: int = 0
    sides: tuple[Side, ...] = ()
    stage: str | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Timestep:
    """How the pipeline hands the noise level to the denoiser.

    Attributes:
        arg: Name of the denoiser's argument; a number, a 0-d tensor or a tensor of shape `(batch,)`.
        scale: Factor to the 0..1000 scale on which timestep bins are defined.
    """

    arg: str = "timestep"
    scale: float = 1.0


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
    """

    name: str
    denoiser: str
    groups: tuple[Group, ...]
    width: Callable[[Mapping[str, Any]], int]
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]
    timestep: Timestep = field(default_factory=Timestep)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages a config may pick; empty for families whose blocks are numbered layers."""
        return tuple(group.stage for group in self.groups if group.stage is not None)


@dataclass(frozen=True)
class Block:
    """One block of a denoiser that reads text, and the group that says how."""

    path: str
    module: nn.Module
    group: Group


def text_blocks(denoiser: nn.Module, spec: FamilySpec) -> list[Block]:
    """Returns the blocks of `denoiser` that read text, in running order."""
    found = []
    for group in spec.groups:
        container = getattr(denoiser, group.path)
        named = container.named_children() if isinstance(container, nn.ModuleList) else [("", container)]
        for name, module in named:
            if module is not None and (group.needs is None or getattr(module, group.needs, False)):
                found.append(Block(f"{group.path}.{name}".rstrip("."), module, group))
    return found


def layered_defaults(num_blocks: int, width: int) -> dict[str, Any]:
    """Returns the published recipe for numbered layers: 4 tokens for each of the first 5 blocks, 100 timestep bins.

    Wide denoisers get fewer bins, so that an adapter stays under a million numbers.
    """
    tokens, layers = 4, min(5, num_blocks)
    bins = next(bins for bins in (100, 50, 20, 10, 5, 1) if bins == 1 or layers * width * (tokens + bins) < 1_000_000)
    return {"num_tokens": tokens, "num_layers": layers, "num_timestep_bins": bins}
