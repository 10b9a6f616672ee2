"""The adapters of a denoiser: named sets of soft tokens that are added, activated, weighted and removed.

Adapters live outside the module tree: `parameters()`, `state_dict()`, `repr` and `dtype` of the denoiser do not change
when adapters are attached.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .branches import GuidanceBranch
from .config import SoftREPAConfig, layers_of
from .families import family_of, text_blocks
from .injection import Injector, Source
from .tokens import SoftTokens
from .weights import Weight, fitted

_ATTRIBUTE = "_softrepa"
# One lock for all denoisers, as a call on a pipeline may change several of them.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Adapter:
    """One adapter of a denoiser.

    Attributes:
        config: Its config.
        tokens: Its learned tokens.
        layers: Index of the layer of `tokens` that each block reads, by block path.
        stages: UNet stage of each of these blocks, by block path; None where blocks are numbered layers.
    """

    config: SoftREPAConfig
    tokens: SoftTokens
    layers: Mapping[str, int]
    stages: Mapping[str, str | None]

    def source(self, weight: Weight) -> Source:
        """Returns the source that the injector uses for this adapter at a weight."""
        weights = {path: _part(weight, layer, self.stages[path]) for path, layer in self.layers.items()}
        return Source(self.tokens, self.layers, weights)


def _part(weight: Weight, layer: int, stage: str | None) -> float:
    """Returns the weight in one layer or stage."""
    if isinstance(weight, Mapping):
        return weight[str(stage)]
    return weight[layer] if isinstance(weight, tuple) else weight


@dataclass(frozen=True)
class State:
    """The loaded and the active adapters of one denoiser; every change creates a new state.

    Attributes:
        adapters: Loaded adapters by name, in the order of loading.
        weights: Weights of the active adapters by name.
        guidance_branch: Branches of classifier-free guidance that receive the tokens.
        enabled: False after `disable_softrepa`.
        pauses: Number of open `softrepa_disabled` contexts; no adapter is used while there is one.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    guidance_branch: GuidanceBranch = "both"
    enabled: bool = True
    pauses: int = 0

    @property
    def taking_part(self) -> dict[str, Weight]:
        """Weights of the adapters that denoiser calls use, by name; empty while adapters are disabled."""
        return dict(self.weights) if self.enabled and not self.pauses else {}

    def sources(self) -> list[Source]:
        """Returns the sources for the injector."""
        return [self.adapters[name].source(weight) for name, weight in self.taking_part.items()]


class Adapters:
    """All soft-token adapters of one denoiser.

    Change them inside the context `changing`, which serialises changes and undoes a failed one.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._injector = Injector.of(denoiser, family_of(denoiser))
        self._state = State()

    @property
    def state(self) -> State:
        """The current state; the object is immutable, so that later changes do not affect it."""
        return self._state

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self._state.adapters)

    @property
    def weights(self) -> dict[str, Weight]:
        """Weights of the active adapters by name."""
        return dict(self._state.weights)

    @property
    def enabled(self) -> bool:
        """Whether denoiser calls use the active adapters."""
        return self._state.enabled and not self._state.pauses

    def __getitem__(self, name: str) -> Adapter:
        adapters = self._state.adapters
        _check_present([name], adapters)
        return adapters[name]

    def become(self, state: State) -> None:
        """Applies a state; if interrupted, calling it again completes the change."""
        self._state = state
        self._injector.use(state.sources(), state.guidance_branch)

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter and makes it the only active one.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._state.adapters:
            raise ValueError(
                f"adapter names must be unique, but {name!r} is already loaded; choose another adapter_name, delete "
                "the old one, or pass hotswap=True to replace its tokens in place"
            )
        adapters = {**self._state.adapters, name: adapter}
        self.become(replace(self._state, adapters=adapters, weights={name: 1.0}, guidance_branch="both"))

    def check_swap(self, name: str, config: SoftREPAConfig) -> None:
        """Checks that `swap` can replace the tokens of an adapter.

        Raises:
            ValueError: There is no adapter of the name, or the shapes or the stages differ.
        """
        old = self[name]
        if old.config.shapes != config.shapes or old.config.stages != config.stages:
            raise ValueError(
                f"a hotswap needs equal shapes and stages: {name!r} has {old.config.shapes}, stages "
                f"{old.config.stages}, the new one {config.shapes}, stages {config.stages}; load it under a new name"
            )

    def swap(self, name: str, config: SoftREPAConfig, tensors: Mapping[str, Tensor]) -> None:
        """Copies other tokens of the same shapes into an adapter; compiled code stays valid.

        Raises:
            ValueError: There is no such adapter, or the shapes or the stages differ.
        """
        self.check_swap(name, config)
        self.write(name, tensors)
        adapters = self._state.adapters
        self._state = replace(self._state, adapters={**adapters, name: replace(adapters[name], config=config)})

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copies values into the tokens of an adapter; no denoiser call begins while they are copied."""
        with self._injector.writing(), torch.no_grad():
            for key, parameter in self[name].tokens.named_parameters():
                parameter.copy_(tensors[key])

    def weighed(self, weights: Mapping[str, Any], guidance_branch: GuidanceBranch) -> State:
        """Returns the state in which exactly the named adapters are active.

        Args:
            weights: Weight of each of these adapters by name.
            guidance_branch: Branches of classifier-free guidance that receive their tokens.

        Raises:
            ValueError: A name is unknown, or a weight does not fit its adapter.
        """
        _check_present(list(weights), self._state.adapters)
        chosen = {name: fitted(weight, name, self[name].config) for name, weight in weights.items()}
        return replace(self._state, weights=chosen, guidance_branch=guidance_branch)

    def set_enabled(self, enabled: bool) -> None:
        """Enables or disables the active adapters; while they are disabled, denoiser calls are the base model's."""
        self.become(replace(self._state, enabled=enabled))

    def pause(self, count: int) -> None:
        """Opens (1) or closes (-1) a `softrepa_disabled` context, in which no adapter is used."""
        self.become(replace(self._state, pauses=self._state.pauses + count))

    def delete(self, names: Iterable[str]) -> None:
        """Removes adapters; no other one becomes active in their place.

        Raises:
            ValueError: A name is unknown.
        """
        gone, state = list(names), self._state
        _check_present(gone, state.adapters)
        self.become(
            replace(
                state,
                adapters={name: adapter for name, adapter in state.adapters.items() if name not in gone},
                weights={name: weight for name, weight in state.weights.items() if name not in gone},
            )
        )

    def use_bank(self, bank: Tensor | int) -> None:
        """Selects the token bank for the calls of this thread: one for all rows, or int64 of shape `(batch,)`."""
        self._injector.use_bank(bank)


def _check_present(names: Sequence[str], adapters: Mapping[str, Adapter]) -> None:
    unknown = [name for name in names if name not in adapters]
    if unknown:
        raise ValueError(f"no soft-token adapter is named {unknown}; loaded are {list(adapters) or 'none'}")


def adapters_of(denoiser: nn.Module) -> Adapters | None:
    """Returns the adapters of a denoiser, or None when it has none."""
    return vars(denoiser).get(_ATTRIBUTE)


@contextmanager
def changing(denoisers: Iterable[nn.Module], *, numbers_of: str | None = None) -> Iterator[None]:
    """A context for changing the adapters of denoisers: one thread at a time, and an exception undoes all changes.

    Args:
        denoisers: The denoisers whose adapters are changed.
        numbers_of: Name of an adapter whose token values are replaced in place, so that they can be restored.
    """
    with _ONE_AT_A_TIME:
        before = [_Before.of(denoiser, numbers_of) for denoiser in denoisers]
        try:
            yield
        except BaseException:
            for each in before:
                each.restore()
            raise


@dataclass(frozen=True)
class _Before:
    """The adapters of a denoiser as they were before a change."""

    denoiser: nn.Module
    adapters: Adapters | None
    state: State
    numbers: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, denoiser: nn.Module, numbers_of: str | None) -> "_Before":
        adapters = adapters_of(denoiser)
        state = State() if adapters is None else adapters.state
        numbers = {
            name: {key: value.clone() for key, value in adapter.tokens.state_dict().items()}
            for name, adapter in state.adapters.items()
            if name == numbers_of
        }
        return cls(denoiser, adapters, state, numbers)

    def restore(self) -> None:
        if self.adapters is None:
            Injector.of(self.denoiser, family_of(self.denoiser)).use([])
            vars(self.denoiser).pop(_ATTRIBUTE, None)
            return
        vars(self.denoiser)[_ATTRIBUTE] = self.adapters
        self.adapters.become(self.state)
        for name, tensors in self.numbers.items():
            self.adapters.write(name, tensors)


def make_adapter(
    denoiser: nn.Module,
    config: SoftREPAConfig,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    text_embeddings: Tensor | None = None,
    generator: torch.Generator | None = None,
    trainable: bool,
) -> Adapter:
    """Returns an adapter for a denoiser, without attaching it.

    Args:
        denoiser: The model it is for.
        config: The adapter's config.
        tensors: Trained tokens with the shapes of `config.shapes`; None to initialise new ones.
        text_embeddings: `(S, D)`, the start of new tokens for `init="text"`.
        generator: Random generator for new tokens.
        trainable: Whether its tokens require gradients.

    Raises:
        ValueError: The config does not fit the denoiser, the initial embeddings do not fit the config, or the values
            are too large for a denoiser in float16.
    """
    layers = layers_of(denoiser, config)
    with torch.inference_mode(False):
        if tensors is None:
            tokens = SoftTokens(config, text_embeddings=text_embeddings, generator=generator)
        else:
            # The drawn values are replaced: a generator of their own leaves the global one untouched.
            tokens = SoftTokens(replace(config, init="normal"), generator=torch.Generator())
            tokens.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
        tokens.requires_grad_(trainable).to(_device(denoiser))
    _check_range(tokens, denoiser)
    stages = {block.path: block.group.stage for block in text_blocks(denoiser, family_of(denoiser))}
    return Adapter(config, tokens, layers, stages)


def _check_range(tokens: SoftTokens, denoiser: Any) -> None:
    """Raises if tokens may become infinite in the float16 of a denoiser, whose largest number is 65504."""
    if getattr(denoiser, "dtype", None) is not torch.float16:
        return
    reach = sum(float(values.detach().abs().max()) for values in tokens.parameters())
    largest = torch.finfo(torch.float16).max
    if reach > largest:
        raise ValueError(
            f"the soft tokens hold numbers up to {reach:.4g}, but {type(denoiser).__name__} runs in float16, which is "
            f"infinite beyond {largest:g}; load the model in bfloat16 or float32, or train the tokens anew"
        )


def attach(denoiser: nn.Module, name: str, adapter: Adapter) -> None:
    """Adds an adapter to a denoiser and makes it the only active one."""
    adapters = adapters_of(denoiser) or Adapters(denoiser)
    adapters.add(name, adapter)
    vars(denoiser)[_ATTRIBUTE] = adapters


def detach(denoiser: nn.Module, names: Iterable[str] | None = None) -> None:
    """Removes the named adapters, or all if `names` is None; without adapters the denoiser is as it was before."""
    adapters = adapters_of(denoiser)
    if adapters is None:
        return
    adapters.delete(adapters.names if names is None else names)
    if not adapters.names:
        del vars(denoiser)[_ATTRIBUTE]


def _device(denoiser: nn.Module) -> torch.device:
    devices = (parameter.device for parameter in denoiser.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
