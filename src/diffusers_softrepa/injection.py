"""Inserts soft tokens into the blocks of a denoiser, as its family spec describes.

Two kinds of `forward` are wrapped. The wrapper is innermost, beneath the hooks of offloading, caching and LoRA, so
that these hooks see a block with the arguments and output shapes of the block without soft tokens.

- The denoiser's `forward` looks up the tokens of this call's timestep and hands each block its own.
- A block's `forward` inserts them into the text stream, runs, and cuts them off the text stream it returns. Blocks
  that count the rows of their text get them at its projections instead (level `"kv"`), which are wrapped as well.

What a denoiser call passes to its blocks is thread-local and restored when the call ends. Under gradient checkpointing
a block runs again in the backward pass, when another timestep may be current; there the tokens are inserted before the
block is checkpointed, so that they are among its saved inputs.

A denoiser call is atomic with respect to changes of the adapters. It reads the active adapters and their values once,
when it begins; later changes affect later calls. Wrappers are installed before a call needs them and removed when
neither the active adapters nor a running call needs them.

Weights. Let f(S) be a block's output with the tokens of the adapters in S. Its output for weights w_1 >= ... >= w_n is
the Choquet integral (Lovasz extension) of f,

    (1 - w_1) f({}) + (w_1 - w_2) f({1}) + ... + w_n f({1, ..., n}),

which is f itself wherever all weights are 0 or 1, and linear in between. Terms with factor zero are not run: at
weights 0 and 1 a block runs once, in between once more for each distinct weight.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .branches import GuidanceBranch, negative_rows, select_rows
from .families import BlockGroup, FamilySpec, text_blocks
from .insertion import cut_tokens, insert_rows, insert_tokens
from .tokens import SoftTokens
from .weights import as_number
from .wrapping import Wrap, bound, positions_of, replaced, uncompiled, wrapped_by

# Key of `joint_attention_kwargs` (and `cross_attention_kwargs`, ...): factor of all adapter weights in one call.
SCALE = "softrepa_scale"

# (factor, tokens) for each term of a block's weighted sum, factor None for 1, tokens None for none.
Terms = tuple[tuple[Tensor | None, Tensor | None], ...]
# What one block does in one denoiser call: its terms, and the rows (bool, (rows,)) that stay without tokens.
BlockWork = tuple[Terms, Tensor | None]
# The same before the timestep is known: (factor, ((source index, layer), ...)).
Plan = tuple[tuple[Tensor | None, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True)
class Source:
    """Soft tokens of one active adapter.

    Attributes:
        tokens: The learned tokens of all layers.
        layers: Index of the layer of `tokens` that each block reads, by block path.
        weights: Adapter weight in each of these blocks, by block path.
    """

    tokens: SoftTokens
    layers: Mapping[str, int]
    weights: Mapping[str, float]


class _ThreadSlot(threading.local):
    """A thread-local value, None unless set; a copy is empty."""

    def __init__(self) -> None:
        self.value: Any = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (_ThreadSlot, ())


@dataclass(eq=False)
class _Site:
    """One block that can receive soft tokens.

    Attributes:
        block: The block.
        group: How it reads text.
        positions: Position of each parameter of its forward.
        current: `BlockWork` of the denoiser call that runs in this thread.
        projected: For level `"kv"`: the tokens that the projections insert in this thread.
        wraps: Wrapper of the block (key `""`) and, for level `"kv"`, of each projection, by path within the block.
    """

    block: nn.Module
    group: BlockGroup
    positions: dict[str, int]
    current: _ThreadSlot = field(default_factory=_ThreadSlot)
    projected: _ThreadSlot = field(default_factory=_ThreadSlot)
    wraps: dict[str, Wrap] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module, group: BlockGroup) -> "_Site":
        site = cls(block, group, positions_of(block))
        site.wraps[""] = Wrap(block, _run_block, site)
        return site

    def set(self, kind: Hashable) -> None:
        """Installs the wrappers for this kind of work, or removes them if it is None."""
        self.wraps[""].set(kind)
        if self.group.level == "kv":
            for path in self.group.projections:
                module = uncompiled(self.block.get_submodule(path))
                if path in self.wraps and self.wraps[path].module is not module:
                    self.wraps[path].set(None)  # LoRA puts a layer of its own in the place of a projection
                    del self.wraps[path]
                self.wraps.setdefault(path, Wrap(module, _run_projection, self)).set(kind)

    def follow(self) -> None:
        """Wraps the current projections; LoRA may have replaced some of them."""
        if any(self.wraps[path].module is not uncompiled(self.block.get_submodule(path)) for path in self.wraps):
            self.set(self.wraps[""].kind)


@dataclass(frozen=True)
class _Work:
    """What denoiser calls do until the active adapters change.

    Attributes:
        sources: Soft tokens of the active adapters.
        branch: Branches of classifier-free guidance that receive them.
        plans: Path and plan of each block that receives tokens.
        kinds: Kind of work of every block that can receive tokens, by path; None for a block that receives none.
    """

    sources: tuple[Source, ...] = ()
    branch: GuidanceBranch = "both"
    plans: tuple[tuple[str, Plan], ...] = ()
    kinds: Mapping[str, Hashable] = field(default_factory=dict)


class _Call:
    """A running call of the denoiser, or of a block in the backward pass, whose wrappers stay installed until it ends.

    Attributes:
        kinds: Kind of work of each block, by path.
    """

    def __init__(self, kinds: Mapping[str, Hashable]) -> None:
        self.kinds = kinds


class _Calls:
    """The running calls, and the lock under which calls begin and end; a copy has no running calls.

    Calls are referenced weakly, so that one that was interrupted before it ended does not keep wrappers installed.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: WeakSet[_Call] = WeakSet()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (_Calls, ())


class Injector:
    """Inserts the soft tokens of all active adapters into the text blocks of one denoiser.

    Args:
        denoiser: The frozen model. It is wrapped only while adapters are active, or while calls that began with
            active adapters still run.
        spec: Its family.
    """

    def __init__(self, denoiser: nn.Module, spec: FamilySpec) -> None:
        self._denoiser = denoiser
        self._guards, self._timed_guards = spec.guards, spec.timed_guards
        self._timestep = spec.timestep_of(cast(Mapping[str, Any], denoiser.config))
        self._positions = positions_of(denoiser)
        self._sites = {b.path: _Site.of(uncompiled(b.module), b.group) for b in text_blocks(denoiser, spec)}
        self._denoiser_wrap = Wrap(denoiser, _run_denoiser, self)
        self._work = _Work()
        self._calls = _Calls()
        self._bank = _ThreadSlot()
        self.context = _ThreadSlot()  # name of the cache context that is open in this thread
        self.checkpointing = _Checkpointing(
            self, denoiser, {site.block: (path, site) for path, site in self._sites.items()}
        )

    @classmethod
    def of(cls, denoiser: nn.Module, spec: FamilySpec) -> "Injector":
        """Returns the injector whose wrapper is installed on a denoiser, or a new injector."""
        injector, _ = wrapped_by(denoiser)
        return cls(denoiser, spec) if injector is None else injector

    def use(self, sources: Sequence[Source], branch: GuidanceBranch = "both") -> None:
        """Sets the soft tokens that later denoiser calls insert; a source of weight 0 is ignored.

        If a call of this method is interrupted, calling it again completes the change.

        Args:
            sources: Soft tokens of the active adapters.
            branch: Branches of classifier-free guidance that receive them.
        """
        sources = tuple(source for source in sources if any(source.weights.values()))
        plans = {path: _plan(path, sources) for path in self._sites}
        kinds = {path: _kind(plan) for path, plan in plans.items()}
        work = _Work(sources, branch, tuple((path, plan) for path, plan in plans.items() if kinds[path]), kinds)
        with self._calls.lock:
            _watch_contexts(self._denoiser, on=bool(sources) and branch != "both")
            self._update_wrappers(work.kinds, self._work.kinds)
            self._work = work
            self._update_wrappers(work.kinds)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Blocks new denoiser calls while the values of tokens are replaced."""
        with self._calls.lock:
            yield

    def use_bank(self, bank: Tensor | int) -> None:
        """Selects the token bank for the calls of this thread: one for all rows, or int64 `(batch,)`; 0 unless set."""
        self._bank.value = bank

    def begin(self, call: _Call) -> None:
        """Registers a running call and installs wrappers that it needs and that were removed."""
        with self._calls.lock:
            self._calls.running.add(call)
            if any(kind and self._sites[path].wraps[""].kind is None for path, kind in call.kinds.items()):
                self._update_wrappers(self._work.kinds)

    def end(self, call: _Call) -> None:
        """Unregisters a call and removes the wrappers that nothing else needs."""
        with self._calls.lock:
            self._calls.running.discard(call)
            if any(kind and not self._work.kinds.get(path) for path, kind in call.kinds.items()):
                self._update_wrappers(self._work.kinds)

    def without_scale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], float]:
        """Returns the arguments of a call without the key `softrepa_scale`, and the value of that key (1.0 without).

        Raises:
            ValueError: The value is not a finite number.
        """
        for name, given in bound(self._positions, args, kwargs).items():
            if name.endswith("attention_kwargs") and isinstance(given, Mapping) and SCALE in given:
                rest = {key: value for key, value in given.items() if key != SCALE}
                args, kwargs = replaced(self._positions, args, kwargs, {name: rest or None})
                return args, kwargs, as_number(given[SCALE], f"{SCALE} in {name}")
        return args, kwargs, 1.0

    def begin_denoiser(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float
    ) -> tuple[_Call, list[tuple[_Site, BlockWork]]]:
        """Registers a denoiser call; returns it with the work of each block in it."""
        with self._calls.lock:
            call = _Call(self._work.kinds)
            work = self.work_of_call(args, kwargs, scale)
            self._calls.running.add(call)
        return call, work

    def _update_wrappers(self, *needs: Mapping[str, Hashable]) -> None:
        """Installs the wrappers that `needs` or a running call requires, and removes all others."""
        held = [*needs, *(call.kinds for call in self._calls.running)]
        kinds = {path: next(filter(None, (need.get(path) for need in held)), None) for path in self._sites}
        on = any(kinds.values())
        if on:
            self._denoiser_wrap.set(tuple(kinds.values()))
        for path, site in self._sites.items():
            site.set(kinds[path])
        if not on:
            self._denoiser_wrap.set(None)

    def work_of_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float
    ) -> list[tuple[_Site, BlockWork]]:
        """Returns the work of each block in a denoiser call with these arguments, with all weights times `scale`."""
        sources, work = self._work.sources, self._work.plans
        if not sources:
            return []
        arguments = bound(self._positions, args, kwargs)
        negative: bool | Tensor = False
        if self._work.branch != "both":
            negative = negative_rows(self._denoiser, self.context.value, arguments)
            if negative is True:
                return []
        self._check_call(arguments, timed=any((source.tokens.num_bins or 1) > 1 for source in sources))
        if any(self._sites[path].group.level == "kv" for path, _ in work) and not torch.compiler.is_compiling():
            for site in self._sites.values():
                site.follow()
        timestep = torch.as_tensor(arguments[self._timestep.arg], device=_device_of(arguments))
        level = self._timestep.level(timestep)  # (batch,) or (1,)
        bank = 0 if self._bank.value is None else self._bank.value
        tables = [_on(source.tokens, level.device)(level, bank=bank) for source in sources]
        rows = max([1] + [table.shape[0] for table in tables])  # 1 or batch
        tables = [table.expand(rows, -1, -1, -1) for table in tables]
        if scale != 1.0:
            work = tuple((path, _plan(path, sources, scale)) for path, _ in work)
        kept = negative if isinstance(negative, Tensor) else None
        return [(self._sites[path], (_terms(plan, tables), kept)) for path, plan in work]

    def _check_call(self, arguments: Mapping[str, Any], *, timed: bool) -> None:
        """Raises ValueError for a call that soft tokens cannot be combined with."""
        _check_undivided(self._denoiser)
        for guard in (*self._guards, *(self._timed_guards if timed else ())):
            hindrance = guard(self._denoiser, arguments)
            if hindrance is not None:
                raise ValueError(hindrance)


def _plan(path: str, sources: Sequence[Source], scale: float = 1.0) -> Plan:
    """Returns the terms of the Choquet integral of one block, without those of factor zero."""
    here = [
        (scale * source.weights[path], (index, layer))
        for index, source in enumerate(sources)
        if (layer := source.layers.get(path)) is not None
    ]
    ranked = sorted(here, key=lambda member: -member[0])
    weights = [1.0, *(weight for weight, _ in ranked), 0.0]
    plan = []
    for size, (upper, lower) in enumerate(itertools.pairwise(weights)):
        if upper != lower:
            members = tuple(sorted(member for _, member in ranked[:size]))
            plan.append((None if upper - lower == 1.0 else _factor(upper - lower), members))
    return tuple(plan)


def _factor(value: float) -> Tensor:
    with torch.inference_mode(False):  # a training call may use it
        return torch.tensor(value, dtype=torch.float32, device="cpu")


def _kind(plan: Plan) -> tuple[tuple[bool, int], ...] | None:
    """Returns the structure of a block's plan without its numbers; None for a block that receives no tokens."""
    if all(not members for _, members in plan):
        return None
    return tuple((factor is None, len(members)) for factor, members in plan)


def _terms(plan: Plan, tables: list[Tensor]) -> Terms:
    """Returns the terms of a plan with the tokens of each."""
    return tuple(
        (factor, torch.cat([tables[index][:, layer] for index, layer in members], dim=1) if members else None)
        for factor, members in plan
    )


def _run_denoiser(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The wrapped forward of a denoiser: sets the work of each block for this call and restores it afterwards."""
    injector, forward = wrapped_by(module)
    if injector is None:
        return forward(*args, **kwargs)
    args, kwargs, scale = injector.without_scale(args, kwargs)
    if torch.compiler.is_compiling():  # calls are not registered: the compiled graph is complete in itself
        return _run_with_work(injector, injector.work_of_call(args, kwargs, scale), forward, args, kwargs)
    call, work = injector.begin_denoiser(args, kwargs, scale)
    try:
        return _run_with_work(injector, work, forward, args, kwargs)
    finally:
        injector.end(call)


def _run_with_work(
    injector: Injector,
    work: list[tuple[_Site, BlockWork]],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    before = [site.current.value for site, _ in work]
    for site, block_work in work:
        site.current.value = block_work
    checkpointed = injector.checkpointing.enter()
    try:
        return forward(*args, **kwargs)
    finally:
        for (site, _), block_work in zip(work, before, strict=True):
            site.current.value = block_work
        if checkpointed:
            injector.checkpointing.leave()


def _run_block(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The wrapped forward of a block: the weighted sum of its outputs with different sets of tokens."""
    site, forward = wrapped_by(module)
    if site is None or site.current.value is None:
        return forward(*args, **kwargs)
    return _run_terms(_projecting(forward, site), site, *args, **kwargs)


def _run_projection(module: nn.Module, /, text: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The wrapped forward of a text projection, for blocks whose tokens are inserted there (level `"kv"`)."""
    site, forward = wrapped_by(module)
    if site is not None and site.projected.value is not None:
        text = insert_rows(text, site.projected.value, at=site.group.at)
    return forward(text, *args, **kwargs)


def _run_terms(forward: Callable[..., Any], site: _Site, *args: Any, **kwargs: Any) -> Any:
    """Returns the weighted sum of the outputs of `forward` with the tokens of each term of `site.current`.

    Rows of the negative guidance branch are taken from the output without tokens.
    """
    terms, kept = site.current.value
    outputs = [_run_with_tokens(forward, site, tokens, args, kwargs) for _, tokens in terms]
    factors = [factor for factor, _ in terms]
    adapted = outputs[0] if factors == [None] else _weighted_sum(factors, outputs)
    if kept is None:
        return adapted
    plain = [output for (_, tokens), output in zip(terms, outputs, strict=True) if tokens is None]
    base = plain[0] if plain else _run_with_tokens(forward, site, None, args, kwargs)
    return select_rows(kept, base, adapted)


def _run_with_tokens(
    forward: Callable[..., Any], site: _Site, tokens: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Inserts `tokens` (batch, K, D) into the text stream, runs the block, cuts them off what it returns.

    For level `"kv"`, `forward` takes them before the block's own arguments.
    """
    by_projection = site.group.level == "kv"
    arguments = bound(site.positions, args, kwargs)
    changed = None if tokens is None else insert_tokens(site.group, arguments, tokens)
    if tokens is None or changed is None:
        return forward(*([None] if by_projection else []), *args, **kwargs)
    args, kwargs = replaced(site.positions, args, kwargs, changed)
    output = forward(*([tokens] if by_projection else []), *args, **kwargs)
    return cut_tokens(site.group, arguments, output, tokens.shape[1])


def _projecting(forward: Callable[..., Any], site: _Site) -> Callable[..., Any]:
    """Returns the forward of a block; for level `"kv"`, one whose first argument is the tokens for its projections."""
    return functools.partial(_run_projecting, forward, site) if site.group.level == "kv" else forward


def _run_projecting(
    forward: Callable[..., Any], site: _Site, tokens: Tensor | None, /, *args: Any, **kwargs: Any
) -> Any:
    before = site.projected.value
    site.projected.value = tokens
    try:
        return forward(*args, **kwargs)
    finally:
        site.projected.value = before


def _weighted_sum(factors: list[Tensor | None], outputs: list[Any]) -> Any:
    """Returns the sum of factor times output; outputs may be tuples or lists of tensors."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return sum(out if factor is None else factor * out for factor, out in zip(factors, outputs, strict=True))
    if isinstance(first, (tuple, list)):
        return type(first)([_weighted_sum(factors, list(parts)) for parts in zip(*outputs, strict=True)])
    return first


def _watch_contexts(denoiser: Any, *, on: bool) -> None:
    """Makes the denoiser's `cache_context` record its name for the injector, or restores the original method."""
    own = vars(denoiser)
    watched = getattr(own.get("cache_context"), "__func__", None) is _named_context
    if on and "cache_context" not in own and hasattr(denoiser, "cache_context"):
        own["cache_context"] = MethodType(_named_context, denoiser)
    elif not on and watched:
        del own["cache_context"]


@contextmanager
def _named_context(denoiser: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """The denoiser's `cache_context`; its injector keeps the name while the context is open."""
    injector, _ = wrapped_by(denoiser)
    if injector is None:
        with type(denoiser).cache_context(denoiser, name, *args, **kwargs):
            yield
        return
    before, injector.context.value = injector.context.value, name
    try:
        with type(denoiser).cache_context(denoiser, name, *args, **kwargs):
            yield
    finally:
        injector.context.value = before


def _check_undivided(denoiser: nn.Module) -> None:
    parallel = getattr(denoiser, "_parallel_config", None)
    if parallel is not None and parallel.context_parallel_config is not None:
        raise ValueError(
            "soft tokens need the whole text stream, but context parallelism divides it among processes, and each "
            "would add tokens of its own; disable_softrepa first, or run without context parallelism"
        )


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    """Returns the device of the first tensor among the arguments of a call, or in a list among them."""
    parts = [part for value in arguments.values() for part in (value if isinstance(value, (list, tuple)) else [value])]
    return next(part.device for part in parts if isinstance(part, Tensor))


def _on(tokens: SoftTokens, device: torch.device) -> SoftTokens:
    """Returns `tokens`, moved to the device of the denoiser call if they are on another one."""
    if tokens.tokens.device != device and device.type != "meta":
        with torch.inference_mode(False):  # the moved tokens must remain trainable
            tokens.to(device)
    return tokens


class _Checkpointing:
    """Makes soft tokens part of the inputs that gradient checkpointing saves.

    While calls run, the denoiser's checkpointing function is replaced by one that inserts the tokens before it
    checkpoints a block. The last of several simultaneous calls restores the original function.

    Args:
        injector: The injector of the denoiser.
        denoiser: The model; it checkpoints its blocks with `_gradient_checkpointing_func`.
        sites: Path and site of each block that can receive tokens.
    """

    _LOCK = threading.Lock()

    def __init__(self, injector: Injector, denoiser: Any, sites: Mapping[nn.Module, tuple[str, _Site]]) -> None:
        self._injector, self._denoiser, self._sites = injector, denoiser, sites
        self._calls = 0
        self._own: Any = None

    def enter(self) -> bool:
        """Begins a call; returns whether it is checkpointed, so that `leave` must be called.

        A denoiser compiled as a whole needs no replacement: there the tokens are inputs of the compiled backward pass.
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
        """Ends a call for which `enter` returned True."""
        with self._LOCK:
            self._calls -= 1
            if self._calls == 0:
                self._denoiser._gradient_checkpointing_func = self._own
                self._own = None

    def _checkpoint(self, own: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        block = getattr(block, "__self__", block)  # PRX checkpoints the bound __call__ of its blocks
        path, site = self._sites.get(uncompiled(block), ("", None))
        if site is None or site.current.value is None:
            return own(block, *args, **kwargs)
        again = _Again(self._injector, block, site, {path: site.wraps[""].kind})
        return _run_terms(functools.partial(own, _projecting(again, site)), site, *args, **kwargs)


class _Again:
    """A checkpointed block whose arguments already hold the tokens, in the forward and again in the backward pass.

    While it runs, its projections have the wrappers of the forward pass, even if the adapters were changed since.
    """

    def __init__(self, injector: Injector, block: nn.Module, site: _Site, kinds: Mapping[str, Hashable]) -> None:
        self._injector, self._block, self._site, self._kinds = injector, block, site, kinds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self._kinds)
        before = self._site.current.value
        self._site.current.value = None
        self._injector.begin(call)
        try:
            return self._block(*args, **kwargs)
        finally:
            self._injector.end(call)
            self._site.current.value = before
