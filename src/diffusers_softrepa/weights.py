"""How strongly adapters take part, as people say it: numbers of any library, one for each adapter, layer or stage.

A weight is one number, or one for each layer of tokens (`[1.0, 0.5, ...]` or `{layer: number}`), or one for each stage
of a UNet (`{"down": number}`). Layers and stages that a mapping leaves out have 1.
"""

import math
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any

from .config import SoftREPAConfig

Weight = float | tuple[float, ...] | Mapping[str, float]


def as_number(value: Any, what: str = "a weight") -> float:
    """Returns a finite number as a float: Python's, numpy's or torch's, also as an array without dimensions.

    Raises:
        ValueError: It is none.
    """
    number = value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and getattr(value, "is_meta", False) is False:
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, but is {_shown(value)}")
    return float(number)


def weights_by_name(names: Any, weights: Any = None) -> dict[str, Any]:
    """Returns the weight of each adapter that is to be active, as it was given.

    Args:
        names: One name, several, or a mapping from names to weights in which None means not active.
        weights: None for 1; one weight for all names, or one for each in their order. Several for a single name are
            one for each of its layers.

    Raises:
        TypeError: The names are not strings, or weights come twice.
        ValueError: There is not one weight for each name.
    """
    if isinstance(names, Mapping):
        if weights is not None:
            raise TypeError(f"{_shown(names)} holds the weights already; leave adapter_weights={_shown(weights)} out")
        chosen = {name: weight for name, weight in names.items() if weight is not None}
        _check_names(list(names))
        return chosen
    several = [names] if isinstance(names, str) else _listed(names)
    if several is None:
        raise TypeError(
            f"adapter_names must be an adapter's name, several, or {{name: weight}}, but are {_shown(names)}"
        )
    _check_names(several)
    each = _each(several, 1.0 if weights is None else weights, single=isinstance(names, str))
    if len(set(several)) != len(several) or len(several) != len(each):
        raise ValueError(f"each adapter needs one weight, but got adapters {several}, weights {_shown(weights)}")
    return dict(zip(several, each, strict=True))


def _each(names: list[str], weights: Any, *, single: bool) -> list[Any]:
    """Returns the weights in the order of the names."""
    if isinstance(weights, Mapping):
        by_name = bool(names) and set(weights) == set(names)
        return [weights[name] for name in names] if by_name else [weights] * len(names)
    listed = _listed(weights)
    if listed is None:
        return [weights] * len(names)
    return [listed] if single and len(listed) != 1 else listed


def fitted(weight: Any, name: str, config: SoftREPAConfig) -> Weight:
    """Returns the weight of an adapter, checked against its layers or stages.

    Raises:
        ValueError: It is no number, or has other layers or stages than the adapter.
    """
    listed = None if isinstance(weight, Mapping) else _listed(weight)
    if not isinstance(weight, Mapping) and listed is None:
        return as_number(weight)
    parts = config.stages if config.stages is not None else list(range(config.num_layers))
    if listed is not None:
        if config.stages is not None or len(listed) != len(parts):
            raise ValueError(
                f"{name!r} has {'stages' if config.stages else 'layers'} {parts}, so its weight is one number, "
                f"{'{stage: number}' if config.stages else f'or a list of {len(parts)}'}, but it is {_shown(weight)}"
            )
        return tuple(as_number(value) for value in listed)
    unknown = [part for part in weight if part not in parts]
    if unknown:
        raise ValueError(
            f"the weights of {name!r} must be for some of its {'stages' if config.stages else 'layers'} {parts}, but "
            f"there are weights for {_shown(unknown)}"
        )
    values = {part: as_number(weight.get(part, 1.0)) for part in parts}
    return {str(part): value for part, value in values.items()} if config.stages else tuple(values.values())


def plain(weight: Weight) -> Any:
    """Returns a weight as a number, list or dict of the caller's own, such as `fitted` takes."""
    if isinstance(weight, Mapping):
        return dict(weight)
    return list(weight) if isinstance(weight, tuple) else weight


def _check_names(names: list[Any]) -> None:
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"names of adapters must be strings, but there is {_shown(wrong[0])}")


def _listed(values: Any) -> list[Any] | None:
    """Returns the values of a sequence or an array as a list; None for what is neither."""
    if hasattr(values, "tolist") and getattr(values, "ndim", 0) > 0:
        return list(values.tolist())
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        return None
    return None if getattr(values, "ndim", None) == 0 else list(values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
