"""The one injector: it reads a family spec and gives a denoiser's blocks their soft tokens.

It is the only code that touches somebody else's module. Two kinds of `forward` are wrapped, innermost, beneath every
hook that offloading, caching or LoRA may have put around them, so that to all of them a block with tokens looks like
the block itself: same arguments in, same shapes out.

- The denoiser's `forward` looks up the tokens of this call's timestep and hands each block its own.
- A block's `forward` inserts them into the text stream, runs, and cuts them off the text stream it returns.

What a call hands to a block is kept per thread and put back when the call ends. Under gradient checkpointing a block
runs again in the backward pass, when another timestep may be current; there the tokens are inserted before the block
is checkpointed, so that they are among the inputs that are kept for it.

Weights. Let f(S) be a block's output with the tokens of the adapters in S. Its output for weights w_1 >= ... >= w_n is
the Choquet integral (Lovasz extension) of f,

    (1 - w_1) f({}) + (w_1 - w_2) f({1}) + ... + w_n f({1, ..., n}),

which is f itself wherever all weights are 0 or 1, and linear in between. Terms with factor zero are not run: at
weights 0 and 1 a block runs once, in between once more for each distinct weight.
"""

import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .families import FamilySpec, Group, text_blocks
from .tokens import SoftTokens

# What one block does in one denoiser call: (factor, tokens) for each term, factor None for 1, tokens None for none.
Terms = tuple[tuple[Tensor | None, Tensor | None], ...]
# The same before the timestep is known: (factor, ((source index, layer), ...)).
Plan = tuple[tuple[Tensor | None, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True)
class Source:
    """Tokens that take part, where, and how strongly.

    Attributes:
        tokens: The table.
        layers: Which layer of it each block reads, by block path.
        weight: Factor of their effect.
    """

    tokens: SoftTokens
    layers: Mapping[str, int]
    weight: float = 1.0


class _ThreadSlot(threading.local):
    """A value of the running thread; a copy starts empty."""

    def __init__(self) -> None:
        self.value: Any = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (_ThreadSlot, ())


@dataclass(eq=False)
class _Site:
    """One block that tokens can go to, and the terms of the call that runs in this thread."""

    block: nn.Module
    group: Group
    positions: dict[str, int]
    current: _ThreadSlot = field(default_factory=_ThreadSlot)


class Injector:
    """Gives the text blocks of one denoiser the tokens of any number of sources.

    Args:
        denoiser: The frozen model. It is wrapped while there are sources, and exactly as it was while there are none.
        spec: Its family.
    """

    def __init__(self, denoiser: nn.Module, spec: FamilySpec) -> None:
        self._denoiser = denoiser
        self._timestep = spec.timestep
        self._positions = _positions(denoiser)
        self._sites = {b.path: _site(_uncompiled(b.module), b.group) for b in text_blocks(denoiser, spec)}
        self._denoiser_wrap = _Wrap(denoiser, _run_denoiser, self)
        self._wraps = {path: _Wrap(site.block, _run_block, site) for path, site in self._sites.items()}
        # One tuple, so that a call in another thread sees all of the old or all of the new.
        self._work: tuple[tuple[Source, ...], tuple[tuple[_Site, Plan], ...]] = ((), ())
        self._bank = _ThreadSlot()
        self._checkpointing = _Checkpointing(denoiser, {site.block: site for site in self._sites.values()})

    def use(self, sources: Sequence[Source]) -> None:
        """Makes `sources` the tokens of all denoiser calls from now on; those of weight 0 count as absent."""
        sources = tuple(source for source in sources if source.weight != 0)
        plans = {path: _plan(path, sources) for path in self._sites}
        kinds = {path: _kind(plan) for path, plan in plans.items()}
        self._work = (sources, tuple((self._sites[path], plan) for path, plan in plans.items() if kinds[path]))
        for path, wrap in self._wraps.items():
            wrap.set(kinds[path])
        self._denoiser_wrap.set(tuple(kinds.values()) if sources else None)

    def use_bank(self, bank: Tensor | int) -> None:
        """Chooses the bank, `(batch,)` or one for all, that calls of this thread read; 0 unless set."""
        self._bank.value = bank

    def _terms_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[_Site, Terms]]:
        """Returns what each site does in the denoiser call with these arguments."""
        sources, work = self._work
        _check_undivided(self._denoiser)
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        timestep = _argument(self._timestep.arg, self._positions, args, kwargs)
        timestep = torch.as_tensor(timestep, device=device).reshape(-1)  # (batch,)
        bank = 0 if self._bank.value is None else self._bank.value
        tables = [_on(source.tokens, device)(timestep, scale=self._timestep.scale, bank=bank) for source in sources]
        rows = max([1] + [table.shape[0] for table in tables])  # 1 or batch
        tables = [table.expand(rows, -1, -1, -1) for table in tables]
        return [(site, _terms(plan, tables)) for site, plan in work]


def _plan(path: str, sources: Sequence[Source]) -> Plan:
    """Returns the Choquet terms of one block, those with factor zero left out."""
    here = [
        (source.weight, (index, source.layers[path])) for index, source in enumerate(sources) if path in source.layers
    ]
    ranked = sorted(here, key=lambda member: -member[0])
    weights = [1.0, *(weight for weight, _ in ranked), 0.0]
    plan = []
    for size, (upper, lower) in enumerate(itertools.pairwise(weights)):
        if upper != lower:
            members = tuple(sorted(member for _, member in ranked[:size]))
            plan.append((None if upper - lower == 1.0 else torch.tensor(upper - lower), members))
    return tuple(plan)


def _kind(plan: Plan) -> tuple[tuple[bool, int], ...] | None:
    """Returns what decides how a block's work runs, whatever the numbers; None when it runs as it is."""
    if all(not members for _, members in plan):
        return None
    return tuple((factor is None, len(members)) for factor, members in plan)


def _terms(plan: Plan, tables: list[Tensor]) -> Terms:
    """Returns the terms with their tokens."""
    return tuple(
        (factor, torch.cat([tables[index][:, layer] for index, layer in members], dim=1) if members else None)
        for factor, members in plan
    )


def _run_denoiser(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The denoiser's forward: each block gets its tokens for this call, and its former ones back after it."""
    injector, forward = _wrapped_by(module)
    if injector is None:
        return forward(*args, **kwargs)
    work = injector._terms_of_call(args, kwargs)
    before = [site.current.value for site, _ in work]
    for site, terms in work:
        site.current.value = terms
    checkpointed = injector._checkpointing.enter()
    try:
        return forward(*args, **kwargs)
    finally:
        for (site, _), terms in zip(work, before, strict=True):
            site.current.value = terms
        if checkpointed:
            injector._checkpointing.leave()


def _run_block(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """A block's forward: the weighted sum of its terms."""
    site, forward = _wrapped_by(module)
    if site is None or site.current.value is None:
        return forward(*args, **kwargs)
    return _run_terms(forward, site, *args, **kwargs)


def _run_terms(forward: Callable[..., Any], site: _Site, *args: Any, **kwargs: Any) -> Any:
    """Returns the weighted sum of `forward` with the tokens of each term that is current at `site`."""
    terms = site.current.value
    outputs = [_run_with_tokens(forward, site, tokens, args, kwargs) for _, tokens in terms]
    factors = [factor for factor, _ in terms]
    return outputs[0] if factors == [None] else _weighted_sum(factors, outputs)


def _run_with_tokens(
    forward: Callable[..., Any], site: _Site, tokens: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Inserts `tokens` (batch, K, D) into the text stream, runs the block, cuts them off what it returns."""
    group = site.group
    text = _argument(group.text, site.positions, args, kwargs)
    if tokens is None or text is None:
        return forward(*args, **kwargs)
    changed = {group.text: _insert_tokens(text, tokens, group.at)}
    for side in group.sides:
        value = _argument(side.arg, site.positions, args, kwargs)
        if value is not None:
            grow = functools.partial(_grow, dim=side.dim, at=group.at, count=tokens.shape[1], fill=side.fill)
            changed[side.arg] = tuple(grow(part) for part in value) if side.each else grow(value)
    args = tuple(
        changed.pop(name) if name in changed and name not in kwargs else value
        for name, value in zip(site.positions, args, strict=False)
    )
    output = forward(*args, **{**kwargs, **changed})
    if group.returns is None:
        return output
    return tuple(
        _cut(part, at=group.at, count=tokens.shape[1]) if index == group.returns and part is not None else part
        for index, part in enumerate(output)
    )


def _insert_tokens(text: Any, tokens: Tensor, at: int) -> Any:
    if isinstance(text, tuple | list):  # IP-Adapter: (text, image tokens)
        return type(text)([_insert_tokens(text[0], tokens, at), *text[1:]])
    rows = tokens.to(device=text.device, dtype=text.dtype)
    if rows.shape[0] == 1:
        rows = rows.expand(text.shape[0], -1, -1)
    elif rows.shape[0] != text.shape[0]:  # a block may see each row several times, as frames
        rows = rows.repeat_interleave(text.shape[0] // rows.shape[0], dim=0)
    return torch.cat([text[:, :at], rows, text[:, at:]], dim=1)  # (batch, sequence + K, D)


def _grow(value: Tensor, *, dim: int, at: int, count: int, fill: Any) -> Tensor:
    """Returns `value` with `count` rows more before row `at` of `dim`."""
    head, tail = value.narrow(dim, 0, at), value.narrow(dim, at, value.shape[dim] - at)
    row = value.narrow(dim, 0, 1)
    rows = (row if fill == "first" else torch.full_like(row, fill)).repeat_interleave(count, dim=dim)
    return torch.cat([head, rows, tail], dim=dim)


def _cut(value: Tensor, *, at: int, count: int) -> Tensor:
    """Returns a text stream (batch, sequence + K, D) without the `count` rows that were inserted at `at`."""
    rest = value[:, count:] if at == 0 else torch.cat([value[:, :at], value[:, at + count :]], dim=1)
    return rest.contiguous()  # as the block itself returns it: compiled code counts on strides


def _weighted_sum(factors: list[Tensor | None], outputs: list[Any]) -> Any:
    """Returns the sum of factor times output, through the tuples that blocks return."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return sum(out if factor is None else factor * out for factor, out in zip(factors, outputs, strict=True))
    if isinstance(first, tuple | list):
        return type(first)([_weighted_sum(factors, list(parts)) for parts in zip(*outputs, strict=True)])
    return first


def _check_undivided(denoiser: nn.Module) -> None:
    parallel = getattr(denoiser, "_parallel_config", None)
    if parallel is not None and parallel.context_parallel_config is not None:
        raise ValueError(
            "soft tokens need the whole text stream, but context parallelism divides it among processes, and each "
            "would add tokens of its own; disable_softrepa first, or run without context parallelism"
        )


def _on(tokens: SoftTokens, device: torch.device) -> SoftTokens:
    """Returns `tokens` where the denoiser runs; they follow it there once, as guests of no hook."""
    if tokens.tokens.device != device and device.type != "meta":
        tokens.to(device)
    return tokens


class _Checkpointing:
    """Puts tokens into the inputs that gradient checkpointing keeps.

    While calls run, the denoiser's own checkpointing function is replaced by one that inserts the tokens first and
    hands it a block without. The last of the calls that run at once puts it back.

    Args:
        denoiser: The model; it checkpoints the blocks that it names to its `_gradient_checkpointing_func`.
        sites: Its blocks that tokens can go to.
    """

    _LOCK = threading.Lock()

    def __init__(self, denoiser: Any, sites: Mapping[nn.Module, _Site]) -> None:
        self._denoiser, self._sites = denoiser, sites
        self._calls = 0
        self._own: Any = None

    def enter(self) -> bool:
        """Begins a call; returns whether it is checkpointed and needs a `leave`.

        What is compiled as a whole needs no such care: there the tokens are inputs of the compiled backward pass.
        """
        if torch.compiler.is_compiling() or not (
            torch.is_grad_enabled() and getattr(self._denoiser, "gradient_checkpointing", False)
        ):
            return False
        with self._LOCK:
            if self._calls == 0:
                self._own = self._denoiser._gradient_checkpointing_func
                self._denoiser._gradient_checkpointing_func = functools.partial(self._checkpoint, self._own)
            self._calls += 1
        return True

    def leave(self) -> None:
        """Ends a call."""
        with self._LOCK:
            self._calls -= 1
            if self._calls == 0:
                self._denoiser._gradient_checkpointing_func = self._own
                self._own = None

    def _checkpoint(self, own: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site = self._sites.get(_uncompiled(block))
        if site is None or site.current.value is None:
            return own(block, *args, **kwargs)
        return _run_terms(functools.partial(own, _WithoutTokens(block, site)), site, *args, **kwargs)


class _WithoutTokens:
    """A block that gets its tokens from outside, now and when it runs again in the backward pass."""

    def __init__(self, block: nn.Module, site: _Site) -> None:
        self._block, self._site = block, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self._site.current.value
        self._site.current.value = None
        try:
            return self._block(*args, **kwargs)
        finally:
            self._site.current.value = before


def _site(block: nn.Module, group: Group) -> _Site:
    return _Site(block, group, _positions(block))


def _uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module inside what `torch.compile(module)` returned."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


def _positions(module: nn.Module) -> dict[str, int]:
    """Returns the position of each parameter of the module's own forward, self left out."""
    return {name: index for index, name in enumerate(inspect.signature(_class_forward(module)).parameters)}


def _argument(name: str, positions: Mapping[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns an argument of a call, given by keyword or, under gradient checkpointing, by position."""
    if name in kwargs:
        return kwargs[name]
    position = positions[name]
    return args[position] if position < len(args) else None


def _class_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


_WRAP = "_softrepa_wrap"


class _Wrap:
    """Puts `run(module, *args, **kwargs)` in place of a module's forward, and takes it off again.

    In its place it is a bound method of the module, as the module's own forward is, and finds what it needs on the
    module. So it may be rebound, wrapped and called by code that knows nothing of it, and compiled code depends on the
    function alone, not on which object was made when.

    Args:
        module: Whose forward.
        run: The wrapper.
        state: What it works with, see `_wrapped_by`.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], state: Any) -> None:
        self.state = state
        self.around: Callable[..., Any] = _class_forward(module)
        self._module, self._run = module, run
        self._kind: Hashable = None

    def set(self, kind: Hashable) -> None:
        """Puts the wrapper on for this kind of work, or takes it off without a trace when it is None."""
        if kind == self._kind:
            return
        own, innermost = vars(self._module), _class_forward(self._module)
        own.setdefault("forward", innermost)
        if self._kind is None:
            self.around = self._find_place(innermost)
            own[_WRAP] = self
        old, new = self._forward(self._kind), self._forward(kind)
        for holder, key in _forward_holders(self._module):
            if holder.get(key) == old:
                holder[key] = new
        if kind is None:
            del own[_WRAP]
        if own["forward"] == innermost:
            del own["forward"]
        self._kind = kind

    def _find_place(self, innermost: MethodType) -> Callable[..., Any]:
        """Returns what to wrap: the innermost forward, beneath all hooks, or a wrapper of unknown make around it."""
        own = vars(self._module)["forward"]
        beneath = any(holder.get(key) == innermost for holder, key in _forward_holders(self._module))
        return innermost if beneath or _is_ours_beneath(own) else own

    def _forward(self, kind: Hashable) -> Callable[..., Any]:
        if kind is None:
            return self.around
        cls: Any = type(self._module)
        return MethodType(_method(self._run, cls, kind), self._module)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Wrap":
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
    method = FunctionType(code, globals(), "forward")
    method.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return method


def _wrapped_by(module: nn.Module) -> tuple[Any, Callable[..., Any]]:
    """Returns the state of the wrapper on a module, None when it was taken off meanwhile, and the forward beneath."""
    wrap = getattr(module, _WRAP, None)
    return (None, _class_forward(module)) if wrap is None else (wrap.state, wrap.around)


def _is_ours_beneath(forward: Any) -> bool:
    """Whether a wrapper, as functools.wraps marks it, holds one of our methods from an earlier time."""
    while forward is not None:
        if getattr(forward, "__globals__", None) is globals():
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
