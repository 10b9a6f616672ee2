"""Replaces a module's `forward` beneath all hooks, and restores it without a trace.

A module's `forward` may be wrapped by hooks of offloading, caching or LoRA, and may be compiled. A `Wrap` is installed
beneath all of them, wherever they keep the forward that they found; removing it leaves each of them with the forward
of the module's class.
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
    names = list(positions)[: len(args)]  # torch 2.6 compiles no zip of different lengths
    return {**dict(zip(names, args, strict=True)), **kwargs}


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
    """Replaces a module's forward by `run(module, *args, **kwargs)`, and restores it.

    The replacement is a bound method of the module, as the module's own forward is, and reads its state from the
    module. So other code can rebind, wrap and call it, and compiled code depends on the function alone, not on this
    object.

    Attributes:
        module: The module whose forward is replaced.
        kind: The kind of work for which the wrapper is installed; None while it is not installed.
        state: What `run` gets from `wrapped_by`.
        around: The forward beneath the wrapper.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], state: Any) -> None:
        self.state = state
        self.around: Callable[..., Any] = _class_forward(module)
        self.module, self._run = module, run
        self.kind: Hashable = None
        self._complete = True  # False after an interrupted `set`

    def set(self, kind: Hashable) -> None:
        """Installs the wrapper for this kind of work, or removes it without a trace if it is None.

        If a call of this method is interrupted, calling it again completes the change.
        """
        own, innermost = vars(self.module), _class_forward(self.module)
        if kind == self.kind and self._complete:
            return
        fresh, self._complete = self.kind is None or not self._complete, False
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
        self._complete = True

    def _find_place(self, innermost: MethodType) -> Callable[..., Any]:
        """Returns the forward to wrap: the innermost one, or the attribute if no known hook keeps the former."""
        own = vars(self.module)["forward"]
        beneath = any(holder.get(key) == innermost for holder, key in _forward_holders(self.module))
        return innermost if beneath or _is_ours_beneath(own) else own

    def _forward(self, kind: Hashable) -> Callable[..., Any]:
        if kind is None:
            return self.around
        cls: Any = type(self.module)
        return MethodType(_method(self._run, cls, kind), self.module)

    def _is_mine(self, forward: Any) -> bool:
        """Whether a forward is one that this wrapper has installed, for any kind of work."""
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
    """Returns a copy of `run` for one class of modules and one kind of work.

    `torch.compile` keeps a limited number of compiled versions of each function. Without copies, all classes of blocks
    and all kinds of work would share that number.
    """
    code = run.__code__.replace(co_name=f"{run.__name__}_of_{cls.__name__}")
    method = FunctionType(code, run.__globals__, "forward")
    method.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    setattr(method, _RUN, run)
    return method


def wrapped_by(module: nn.Module) -> tuple[Any, Callable[..., Any]]:
    """Returns the state of the wrapper on a module, None if it was removed meanwhile, and the forward beneath it."""
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
    """Yields dictionary and key of every place that may keep a forward of the module: its attribute, accelerate's copy
    of the replaced forward, and the hooks of diffusers."""
    yield vars(module), "forward"
    yield vars(module), "_old_forward"
    registry = vars(module).get("_diffusers_hook")
    for reference in registry._fn_refs if registry is not None else ():
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"
