"""The adapters of a denoiser: named sets of soft tokens that are added, activated, weighted and removed.

They are guests. They are kept beside the denoiser's modules, not among them: its `parameters()`, `state_dict()`,
`repr` and dtype are what they were, whatever is attached.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .config import SoftREPAConfig, layers_of
from .families import family_of
from .injection import Injector, Source
from .tokens import SoftTokens

_ATTRIBUTE = "_softrepa"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a denoiser: its config, its tokens, and which layer of them each block reads."""

    config: SoftREPAConfig
    tokens: SoftTokens
    layers: Mapping[str, int]


class Adapters:
    """All soft-token adapters of one denoiser.

    Attributes:
        enabled: Whether the active adapters take part in denoiser calls.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._injector = Injector(denoiser, family_of(denoiser))
        self._adapters: dict[str, Adapter] = {}
        self._weights: dict[str, float] = {}
        self.enabled = True

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order in which they came."""
        return list(self._adapters)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the active adapters by name."""
        return dict(self._weights)

    def __getitem__(self, name: str) -> Adapter:
        self._check_present([name])
        return self._adapters[name]

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter and makes it the active one.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._adapters:
            raise ValueError(
                f"adapter names must be unique, but {name!r} is already loaded; choose another adapter_name, delete "
                "the old one, or pass hotswap=True to replace its tokens in place"
            )
        self._adapters[name] = adapter
        self.activate([name], [1.0])

    def check_swap(self, name: str, config: SoftREPAConfig) -> None:
        """Checks that `swap` can take an adapter.

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
        """Copies other tokens of the same shapes into an adapter, without touching what is compiled.

        Raises:
            ValueError: There is no such adapter, or the shapes or the stages differ.
        """
        self.check_swap(name, config)
        old = self[name]
        with torch.no_grad():
            for key, parameter in old.tokens.named_parameters():
                parameter.copy_(tensors[key])
        self._adapters[name] = replace(old, config=config)

    def activate(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Makes exactly the named adapters active, with these weights.

        Raises:
            ValueError: A name is unknown or comes twice, or a weight is not a finite number.
        """
        self._check_present(names)
        if len(set(names)) != len(names) or len(names) != len(weights):
            raise ValueError(f"each adapter needs one weight, but got adapters {list(names)}, weights {list(weights)}")
        for weight in weights:
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"a weight must be a finite number, but is {weight!r}")
        self._weights = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
        self._refresh()

    def set_enabled(self, enabled: bool) -> None:
        """Switches the active adapters on or off; off, every denoiser call is the base model's."""
        self.enabled = enabled
        self._refresh()

    def delete(self, names: Iterable[str]) -> None:
        """Removes adapters; no other one becomes active in their place.

        Raises:
            ValueError: A name is unknown.
        """
        names = list(names)
        self._check_present(names)
        for name in names:
            del self._adapters[name]
            self._weights.pop(name, None)
        self._refresh()

    def use_bank(self, bank: Tensor | int) -> None:
        """Chooses the bank that calls of this thread read: one for all rows, or int64 of shape (batch,)."""
        self._injector.use_bank(bank)

    def _refresh(self) -> None:
        active = self._weights if self.enabled else {}
        self._injector.use(
            [Source(self._adapters[name].tokens, self._adapters[name].layers, w) for name, w in active.items()]
        )

    def _check_present(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._adapters]
        if unknown:
            raise ValueError(f"no soft-token adapter is named {unknown}; loaded are {self.names or 'none'}")


def adapters_of(denoiser: nn.Module) -> Adapters | None:
    """Returns the adapters of a denoiser, or None when it has none."""
    return vars(denoiser).get(_ATTRIBUTE)


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
        config: What it is.
        tensors: Its trained values, checked against `config.shapes`; fresh ones are drawn when None.
        text_embeddings: What fresh values start from, for `init="text"`.
        generator: Source of fresh values.
        trainable: Whether its tokens require gradients.

    Raises:
        ValueError: The config does not fit the denoiser, or the initial embeddings do not fit the config.
    """
    layers = layers_of(denoiser, config)
    if tensors is None:
        tokens = SoftTokens(config, text_embeddings=text_embeddings, generator=generator)
    else:
        # The values drawn are replaced, so they are not drawn from the generator that the caller's pictures come from.
        tokens = SoftTokens(replace(config, init="normal"), generator=torch.Generator())
        tokens.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    tokens.requires_grad_(trainable).to(_device(denoiser))
    return Adapter(config, tokens, layers)


def attach(denoiser: nn.Module, name: str, adapter: Adapter) -> None:
    """Adds an adapter to a denoiser and activates it alone."""
    adapters = adapters_of(denoiser) or Adapters(denoiser)
    adapters.add(name, adapter)
    vars(denoiser)[_ATTRIBUTE] = adapters


def detach(denoiser: nn.Module, names: Iterable[str] | None = None) -> None:
    """Removes adapters, all of them when `names` is None; the last one leaves no trace."""
    adapters = adapters_of(denoiser)
    if adapters is None:
        return
    adapters.delete(adapters.names if names is None else names)
    if not adapters.names:
        del vars(denoiser)[_ATTRIBUTE]


def _device(denoiser: nn.Module) -> torch.device:
    devices = (parameter.device for parameter in denoiser.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
