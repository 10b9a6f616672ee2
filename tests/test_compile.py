"""Compiled denoisers: no graph break, and no compilation but the first of each kind of work."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa

SD15, SDXL, SD3, FLUX = tiny.FAMILIES
slow = pytest.mark.slow


COUNTED = Version("2.13") <= Version(torch.__version__)
"""Older releases of torch compile some work again that they have seen; what they compute is compared all the same."""


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    with nullcontext() if COUNTED else torch._dynamo.config.patch(cache_size_limit=64):
        yield
    torch._dynamo.reset()


def whole(denoiser: nn.Module, backend: Any) -> nn.Module:
    denoiser.compile(fullgraph=True, backend=backend)
    return denoiser


def wrapped(denoiser: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(denoiser, fullgraph=True, backend=backend)


def repeated_blocks(denoiser: nn.Module, backend: Any) -> nn.Module:
    if not hasattr(denoiser, "compile_repeated_blocks"):
        pytest.skip("this diffusers has no compile_repeated_blocks")
    denoiser.compile_repeated_blocks(fullgraph=True, backend=backend)
    return denoiser


def each_block(denoiser: nn.Module, backend: Any) -> nn.Module:
    for block in denoiser.transformer_blocks:
        block.compile(fullgraph=True, backend=backend)
    return denoiser


def each_block_replaced(denoiser: nn.Module, backend: Any) -> nn.Module:
    """The recipe of PyTorch's tutorials for regional compilation."""
    for index, block in enumerate(denoiser.transformer_blocks):
        denoiser.transformer_blocks[index] = torch.compile(block, fullgraph=True, backend=backend)
    return denoiser


def forward_replaced(denoiser: nn.Module, backend: Any) -> nn.Module:
    denoiser.forward = torch.compile(denoiser.forward, fullgraph=True, backend=backend)
    return denoiser


Compile = Callable[[nn.Module, Any], nn.Module]


class Compiled:
    """A compiled denoiser and an equal one that is not, which are given the same tokens and must agree."""

    def __init__(self, family: tiny.Family, compile_with: Compile, *, load_first: bool = False) -> None:
        self.family, self.inputs = family, family.inputs(2)
        self.denoiser = family.denoiser().requires_grad_(False)
        self.eager = copy.deepcopy(self.denoiser)
        self.config = SoftREPAConfig.for_denoiser(self.denoiser, num_timestep_bins=10)
        self.tokens = [{name: torch.randn(shape) for name, shape in self.config.shapes.items()} for _ in range(3)]
        self.counter = CompileCounter()
        if load_first:
            self.load(0)
        self.compiled = compile_with(self.denoiser, self.counter)

    def both(self, verb: str, *args: Any, **kwargs: Any) -> None:
        for target in (self.denoiser, self.eager):
            getattr(target, verb)(*args, **kwargs)

    def load(self, index: int, name: str = "a", **kwargs: Any) -> None:
        for target in (self.denoiser, self.eager):
            load_softrepa(target, self.tokens[index], name, config=self.config, **kwargs)

    @torch.no_grad()
    def graphs(self, *timesteps: float) -> int:
        """Returns how many graphs were compiled for calls at these timesteps."""
        before = self.counter.frame_count
        for timestep in timesteps or (500.0,):
            expected = self.family.call(self.eager, self.inputs, timestep)
            assert_close(self.family.call(self.compiled, self.inputs, timestep), expected)
        return self.counter.frame_count - before


def check_each_kind_of_work_is_compiled_once(case: Compiled, *, at_most: int, load_first: bool) -> None:
    """The law. `at_most` graphs for what was not seen before, none for all that was."""
    new, off, known = range(1, at_most + 1), range(at_most + 1 if load_first else 1), range(1)
    work: list[tuple[str, Callable[[], None], range, tuple[float, ...]]] = [
        ("first adapter", lambda: case.load(0), new, ()),
        ("timesteps", lambda: None, known, (10.0, 350.0, 999.0)),
        ("hotswapped", lambda: case.load(1, hotswap=True), known, ()),
        ("another of the same shape", lambda: case.load(2, "b"), known, ()),
        ("in between", lambda: case.both("set_softrepa", "b", 0.3), new, ()),
        ("another weight", lambda: case.both("set_softrepa", "b", 0.7), known, (10.0, 999.0)),
        ("another weight of another adapter", lambda: case.both("set_softrepa", "a", 0.123), known, ()),
        ("two at once", lambda: case.both("set_softrepa", ["a", "b"]), new, ()),
        ("off", lambda: case.both("disable_softrepa"), off, ()),
        ("on", lambda: case.both("enable_softrepa"), known, ()),
        ("weight zero is off", lambda: case.both("set_softrepa", "a", 0.0), known, ()),
        ("weight one", lambda: case.both("set_softrepa", "a"), known, ()),
        ("unloaded", lambda: case.both("unload_softrepa"), known, ()),
        ("loaded again", lambda: case.load(2, "again"), known, (10.0, 999.0)),
    ]
    if load_first:
        work[0] = ("first adapter", lambda: None, new, ())
    else:
        work.insert(0, ("base", lambda: None, new, ()))
    for name, change, expected, timesteps in work:
        change()
        graphs = case.graphs(*timesteps)
        assert graphs in expected or not COUNTED, (name, graphs)


@pytest.mark.parametrize(
    ("family", "compile_with", "load_first"),
    [
        (SD15, whole, False),
        (SD3, wrapped, False),
        (FLUX, whole, True),
        pytest.param(SD15, wrapped, True, marks=slow),
        pytest.param(SDXL, whole, False, marks=slow),
        pytest.param(SD3, whole, True, marks=slow),
        pytest.param(SD3, forward_replaced, False, marks=slow),
        pytest.param(FLUX, wrapped, False, marks=slow),
    ],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", f"loaded first: {value}"),
)
def test_a_denoiser_compiled_as_a_whole(family: tiny.Family, compile_with: Compile, load_first: bool):
    case = Compiled(family, compile_with, load_first=load_first)
    check_each_kind_of_work_is_compiled_once(case, at_most=1, load_first=load_first)


@pytest.mark.parametrize(
    ("family", "compile_with", "load_first", "at_most"),
    [
        (FLUX, repeated_blocks, False, 3),
        (SD3, each_block, True, 3),
        pytest.param(FLUX, repeated_blocks, True, 4, marks=slow),
        pytest.param(SD3, each_block, False, 3, marks=slow),
        pytest.param(SD3, each_block_replaced, False, 3, marks=slow),
        pytest.param(SD3, each_block_replaced, True, 3, marks=slow),
    ],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", str(value)),
)
def test_a_denoiser_compiled_block_by_block(
    family: tiny.Family, compile_with: Compile, load_first: bool, at_most: int
):
    """Blocks that differ, as first and last ones, are compiled apart: `at_most` is what the bare denoiser needs."""
    case = Compiled(family, compile_with, load_first=load_first)
    check_each_kind_of_work_is_compiled_once(case, at_most=at_most, load_first=load_first)
