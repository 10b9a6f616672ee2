"""The settings that an evaluation compares: the base model, or adapters with weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..denoisers import takes_soft_tokens
from ..pipeline import enable_softrepa, get_softrepa_adapters, set_softrepa, softrepa_left_as_found
from ..quoting import quoted
from ..weights import as_number

AdapterSetting = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Setting:
    """One setting of a comparison.

    Attributes:
        label: Its name in tables and folders: `base`, `a`, `a:0.5`, `a:0.5+b:1`, `a:1,0.5`, `a:down=0.5`.
        weights: Weight of each active adapter, a number, a list or a dict; empty for the base model.
    """

    label: str
    weights: Mapping[str, Any] = field(default_factory=dict)


def settings_of(pipe: Any, adapters: Sequence[AdapterSetting]) -> list[Setting]:
    """Returns the settings that `evaluate` was asked to compare.

    Raises:
        ValueError: A setting names an adapter that is not loaded or has a weight that does not fit it, two settings
            are equal, or there is none.
    """
    if isinstance(adapters, str | Mapping) or not adapters:
        raise ValueError(f'adapters must be a list such as [None, "softrepa"], but is {adapters!r}')
    settings = [setting_of(each) for each in adapters]
    labels = [setting.label for setting in settings]
    if len(set(labels)) != len(labels):
        raise ValueError(f"the settings must differ, but are {labels}; leave out the second of equal ones")
    if len({label.casefold() for label in labels}) != len(labels):
        raise ValueError(f"settings must differ in more than case, because some disks ignore case, but are {labels}")
    asked = {name for setting in settings for name in setting.weights}
    loaded = _loaded(pipe)
    missing = sorted(asked - set(loaded))
    if missing:
        raise ValueError(
            f"no soft-token adapter is named {missing}; loaded are {loaded or 'none'}; call load_softrepa first"
        )
    with left_as_found(pipe):
        for setting in settings:
            use(pipe, setting)  # raises now for layers or stages that an adapter does not have
    return settings


def setting_of(given: AdapterSetting) -> Setting:
    """Returns a setting with its label, checked as far as that needs no pipeline; errors as in `settings_of`."""
    if given is None:
        return Setting("base")
    if isinstance(given, str):
        return Setting(given, {given: 1.0})
    if not isinstance(given, Mapping):
        raise ValueError(
            f"a setting is None, an adapter's name or a mapping of names to weights, but is {quoted(given)}"
        )
    weights = {name: _weight(weight, name) for name, weight in given.items() if weight is not None}
    return Setting("+".join(f"{name}:{_text(weight)}" for name, weight in weights.items()) or "base", weights)


def _weight(given: Any, name: str) -> Any:
    """Returns a weight as a float, or a list or dict of floats."""
    if isinstance(given, list | tuple):
        return [_weight(each, name) for each in given]
    if isinstance(given, Mapping):
        return {part: _weight(each, name) for part, each in given.items()}
    return as_number(given, f"the weight of {quoted(name)}")


def _text(weight: Any) -> str:
    if isinstance(weight, list):
        return ",".join(map(_text, weight))
    if isinstance(weight, dict):
        return ",".join(f"{part}={_text(each)}" for part, each in weight.items())
    return f"{weight:g}"


def _loaded(pipe: Any) -> list[str]:
    """Returns the names of a pipeline's adapters; an empty list if its denoiser takes no soft tokens."""
    return list(get_softrepa_adapters(pipe)) if takes_soft_tokens(pipe) else []


def use(pipe: Any, setting: Setting) -> None:
    """Activates a setting on all denoisers of a pipeline."""
    if _loaded(pipe):
        set_softrepa(pipe, setting.weights)
        enable_softrepa(pipe)


@contextmanager
def left_as_found(pipe: Any) -> Iterator[None]:
    """Puts a pipeline in eval mode without progress bars; restores that and its adapters afterwards."""
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
