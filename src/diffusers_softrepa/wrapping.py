"""Another forward in place of a module's own, innermost, and off again without a trace.

A module's `forward` may be wrapped by hooks of offloading, caching or LoRA, and may be compiled. What is put on here
goes beneath all of them, wherever they keep the forward that they found; what is taken off leaves each of them with
the forward of the module itself.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module inside what `torch.compile(module)` returned."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


def positions_of(module: nn.Module) -> dict[str, int]:
    """Returns the position of each parameter of the module's own forward, self left out."""
    return {name: index for index, name in enumerate(inspect.signature(_class_forward(module)).parameters)}


def bound(positions: Mapping[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name, given by keyword or, under gradient checkpointing, by position."""
    return {**dict(zip(positions, args, strict=False)), **kwargs}


def replaced(
    positions: Mapping[str, int], args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with some of them changed, each given as it was given before."""
    names = list(positions)[: len(args)]
    by_keyword = {name: value for name, value in changed.items() if name not in names}
    by_position = tuple(changed.get(name, value) for name, value in zip(names, args, strict=True))
    return by_position, {**kwargs, **by_keyword}


def _class_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


_WRAP = "_softrepa_wrap"
_RUN = "_softrepa_run"


class Wrap:
    """Puts `run(module, *args, **kwargs)` in place of a module's forward, and takes it off again.

    In its place it is a bound method of the module, as the module's own forward is, and finds what it needs on the
    module. So it may be rebound, wrapped and called by code that knows nothing of it, and compiled code depends on the
    function alone, not on which object was made when.

    Attributes:
        module: Whose forward.
        kind: The kind of work that it is on for; None while it is off.
        state: What it works with, see `wrapped_by`.
        around: The forward beneath it.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], state: Any) -> None:
        self.state = state
        self.around: Callable[..., Any] = _class_forward(module)
        self.module, self._run = module, run
        self.kind: Hashable = None
        self._settled = True  # False where `set` was interrupted

    def set(self, kind: Hashable) -> None:
        """Puts the wrapper on for this kind of work, or takes it off without a trace when it is None.

        Interrupted anywhere, a further call ends in what that one was asked for.
        """
        own, innermost = vars(self.module), _class_forward(self.module)
        if kind == self.kind and self._settled:
            return
        fresh, self._settled = self.kind is None or not self._settled, False
        own.setdefault("forward", innermost)
        if own.get(_WRAP) is not self:
            self.around = self._find_place(innermost)
            own[_WRAP] = self
        new = self._forward(kind)
        for holder, key in _forward_holders(self.module):
            if self._is_mine(holder.get(key)) or (fresh and holder.get(key) == self.around):
                holder[key] = new
        self.kind = kind
        if own.get("forward") == innermost:
            del own["forward"]
        if kind is None:
            own.pop(_WRAP, None)
        self._settled = True

    def _find_place(self, innermost: MethodType) -> Callable[..., Any]:
        """Returns what to wrap: the innermost forward, beneath all hooks, or a wrapper of unknown make around it."""
        own = vars(self.module)["forward"]
        beneath = any(holder.get(key) == innermost for holder, key in _forward_holders(self.module))
        return innermost if beneath or _is_ours_beneath(own) else own

    def _forward(self, kind: Hashable) -> Callable[..., Any]:
        if kind is None:
            return self.around
        cls: Any = type(self.module)
        return MethodType(_method(self._run, cls, kind), self.module)

    def _is_mine(self, forward: Any) -> bool:
        """Whether a forward is what this wrapper has put on the module, for whatever kind of work."""
        method = getattr(forward, "__func__", None)
        return vars(method).get(_RUN) is self._run if isinstance(method, FunctionType) else False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wrap":
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a denoiser with soft-token adapters cannot be pickled; save_softrepa them, unload_softrepa, pickle, and "
            "load_softrepa them again (state_dict, save_pretrained and copy.deepcopy work as they are)"
        )


@functools.cache
def _method(run: Callable[..., Any], cls: type[nn.Module], kind: Hashable) -> FunctionType:
    """Returns `run` as a function of its own for one class of modules and one kind of work.

    Compilation keeps a few compiled versions of each function, and gives up beyond. Without this, all blocks, all
    denoisers and all that one does with them would share those few.
    """
    code = run.__code__.replace(co_name=f"{run.__name__}_of_{cls.__name__}")
    method = FunctionType(code, run.__globals__, "forward")
    method.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    setattr(method, _RUN, run)
    return method


def wrapped_by(module: nn.Module) -> tuple[Any, Callable[..., Any]]:
    """Returns the state of the wrapper on a module, None when it was taken off meanwhile, and the forward beneath."""
    wrap = getattr(module, _WRAP, None)
    return (None, _class_forward(module)) if wrap is None else (wrap.state, wrap.around)


def _is_ours_beneath(forward: Any) -> bool:
    """Whether a wrapper, as functools.wraps marks it, holds one of our methods from an earlier time."""
    while forward is not None:
        if getattr(forward, "__globals__", {}).get("__package__") == __package__:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _forward_holders(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields every place that may keep a forward of the module: its own attribute, accelerate's copy of what it
    replaced, diffusers' chain of hooks."""
    yield vars(module), "forward"
    yield vars(module), "_old_forward"
    registry = vars(module).get("_diffusers_hook")
    for reference in registry._fn_refs if registry is not None else ():
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"
