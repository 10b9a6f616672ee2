"""Parses adapter weights: numbers of Python, numpy or torch, one for each adapter, layer or stage.

The weight of an adapter is one number, or one for each layer of tokens (`[1.0, 0.5, ...]` or `{layer: number}`), or
one for each stage of a UNet (`{"down": number}`). Layers and stages that a mapping leaves out have weight 1.
"""

import math
from collections.abc import Iterable, KeysView, Mapping, Set
from numbers import Real
from typing import Any

from .config import SoftREPAConfig
from .quoting import quoted

LARGEST_WEIGHT = 1e6  # beyond it float32 activations may overflow

Weight = float | tuple[float, ...] | Mapping[str, float]


def as_number(value: Any, what: str = "a weight") -> float:
    """Returns a number of Python, numpy or torch, or a 0-d array of one, as a float.

    Raises:
        ValueError: It is not a finite number, or is larger than `LARGEST_WEIGHT` in size.
    """
    try:
        number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
        found = float(number) if isinstance(number, Real) and not isinstance(number, bool) else math.nan
    except (RuntimeError, ValueError, OverflowError):  # tensors without values; more digits than a float holds
        found = math.nan
    if not abs(found) <= LARGEST_WEIGHT:
        raise ValueError(
            f"{what} must be a finite number, at most {LARGEST_WEIGHT:g} in size, but is {quoted(value, 100)}"
        )
    return found


def weights_by_name(names: Any, weights: Any = None) -> dict[str, Any]:
    """Returns the weight of each adapter to activate, without checking the weights themselves.

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
            raise TypeError(
                f"{quoted(names, 100)} holds the weights already; leave adapter_weights={quoted(weights, 100)} out"
            )
        chosen = {name: weight for name, weight in names.items() if weight is not None}
        _check_names(list(names))
        return chosen
    several = listed_names(names)
    each = _each(several, 1.0 if weights is None else weights, single=isinstance(names, str))
    if len(set(several)) != len(several) or len(several) != len(each):
        raise ValueError(f"each adapter needs one weight, but got adapters {several}, weights {quoted(weights, 100)}")
    return dict(zip(several, each, strict=True))


def listed_names(names: Any) -> list[str]:
    """Returns one name or several as a list.

    Raises:
        TypeError: They are not strings.
    """
    several = [names] if isinstance(names, str) else _listed(names)
    if several is None:
        raise TypeError(
            f"adapter_names must be an adapter's name, several, or {{name: weight}}, but are {quoted(names, 100)}"
        )
    _check_names(several)
    return several


def _each(names: list[str], weights: Any, *, single: bool) -> list[Any]:
    """Returns one weight for each name, in the order of the names."""
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
        ValueError: It is not a finite number, or names layers or stages that the adapter does not have.
    """
    listed = None if isinstance(weight, Mapping) else _listed(weight)
    if not isinstance(weight, Mapping) and listed is None:
        return as_number(weight)
    parts = config.stages if config.stages is not None else list(range(config.num_layers))
    if listed is not None:
        if config.stages is not None or len(listed) != len(parts):
            raise ValueError(
                f"{name!r} has {'stages' if config.stages else 'layers'} {parts}, so its weight is one number, "
                f"{'{stage: number}' if config.stages else f'or a list of {len(parts)}'}, but it is "
                f"{quoted(weight, 100)}"
            )
        return tuple(as_number(value) for value in listed)
    unknown = [part for part in weight if part not in parts or isinstance(part, bool)]
    if unknown:
        raise ValueError(
            f"the weights of {name!r} must be for some of its {'stages' if config.stages else 'layers'} {parts}, but "
            f"there are weights for {quoted(unknown, 100)}"
        )
    values = {part: as_number(weight.get(part, 1.0)) for part in parts}
    return {str(part): value for part, value in values.items()} if config.stages else tuple(values.values())


def plain(weight: Weight) -> Any:
    """Returns a weight as a number, a new list or a new dict, which `set_softrepa` takes."""
    if isinstance(weight, Mapping):
        return dict(weight)
    return list(weight) if isinstance(weight, tuple) else weight


def _check_names(names: list[Any]) -> None:
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"names of adapters must be strings, but there is {quoted(wrong[0], 100)}")


def _listed(values: Any) -> list[Any] | None:
    """Returns the values of an iterable or an array as a list; None for a single value, a string or a mapping."""
    unordered = isinstance(values, Set) and not isinstance(values, KeysView)
    if unordered or isinstance(values, str | bytes | bytearray | memoryview | Mapping):
        return None
    if hasattr(values, "tolist") and getattr(values, "ndim", 0) > 0:
        try:
            return list(values.tolist())
        except (RuntimeError, NotImplementedError):  # sparse tensors, and tensors without values
            return None
    return list(values) if isinstance(values, Iterable) and getattr(values, "ndim", None) != 0 else None
