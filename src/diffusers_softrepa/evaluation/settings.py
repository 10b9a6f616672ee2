"""The settings that are compared: the base model, adapters at their weights; and the pipeline left as found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..denoisers import takes_soft_tokens
from ..pipeline import enable_softrepa, get_softrepa_adapters, set_softrepa, softrepa_left_as_found

AdapterSetting = str | Mapping[str, float] | None


@dataclass(frozen=True)
class Setting:
    """One column of a comparison.

    Attributes:
        label: How tables call it: `base`, `a`, `a:0.5`, `a:0.5+b:1`.
        weights: Weight of each active adapter; none for the base model.
    """

    label: str
    weights: Mapping[str, float] = field(default_factory=dict)


def settings_of(pipe: Any, adapters: Sequence[AdapterSetting]) -> list[Setting]:
    """Returns the settings that `evaluate` was asked to compare.

    Raises:
        ValueError: One names an adapter that is not loaded, or two are the same, or there is none.
    """
    if isinstance(adapters, str | Mapping) or not adapters:
        raise ValueError(f'adapters must be a list such as [None, "softrepa"], but is {adapters!r}')
    settings = [_setting(each) for each in adapters]
    labels = [setting.label for setting in settings]
    if len(set(labels)) != len(labels):
        raise ValueError(f"each setting must come once, but they are {labels}")
    asked = {name for setting in settings for name in setting.weights}
    loaded = _loaded(pipe)
    missing = sorted(asked - set(loaded))
    if missing:
        raise ValueError(
            f"no soft-token adapter is named {missing}; loaded are {loaded or 'none'}: load_softrepa it first"
        )
    return settings


def _setting(given: AdapterSetting) -> Setting:
    if given is None:
        return Setting("base")
    if isinstance(given, str):
        return Setting(given, {given: 1.0})
    label = "+".join(f"{name}:{weight:g}" for name, weight in given.items())
    return Setting(label or "base", {name: float(weight) for name, weight in given.items()})


def _loaded(pipe: Any) -> list[str]:
    """Returns the names of the adapters of a pipeline; none also of a pipeline that can have none."""
    return list(get_softrepa_adapters(pipe)) if takes_soft_tokens(pipe) else []


def use(pipe: Any, setting: Setting) -> None:
    """Makes a setting the pipeline's, on all of its denoisers."""
    if _loaded(pipe):
        set_softrepa(pipe, list(setting.weights), list(setting.weights.values()))
        enable_softrepa(pipe)


@contextmanager
def left_as_found(pipe: Any) -> Iterator[None]:
    """Lets a pipeline be used for sampling, in eval mode without progress bars; puts everything back afterwards."""
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    modes = [module.training for module in modules]
    progress = getattr(pipe, "_progress_bar_config", {})
    try:
        for module in modules:
            module.training = False
        pipe.set_progress_bar_config(disable=True)
        with softrepa_left_as_found(pipe) if takes_soft_tokens(pipe) else nullcontext():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        pipe.set_progress_bar_config(**progress)
