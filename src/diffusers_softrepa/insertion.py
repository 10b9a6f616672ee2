"""Inserts rows for soft tokens into the arguments of a block and removes them from its output.

Full attention depends on the order of a sequence only through masks, rotary rows and modulation, which are extended
together with the text, and the output rows of soft tokens are removed. So a soft token acts as one more key and value
of each attention in the block, wherever it stands in the sequence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .families import BlockGroup, ExtendedArgument


def insert_tokens(group: BlockGroup, arguments: Mapping[str, Any], tokens: Tensor) -> dict[str, Any] | None:
    """Returns the arguments of a block that change when soft tokens are inserted.

    Args:
        group: How the block reads text.
        arguments: The block's arguments by name; they are not modified.
        tokens: `(batch or 1, K, D)`.

    Returns:
        Changed arguments by name; None if the arguments hold no text.
    """
    texts = [_stream(arguments.get(name)) for name in group.texts]
    if any(text is None or text.shape[group.seq_dim] == 0 for text in texts):
        return None
    at: int = arguments[group.at] if isinstance(group.at, str) else group.at
    length, count = texts[0].shape[group.seq_dim], tokens.shape[1]
    changed: dict[str, Any] = {}
    if group.level == "block":
        widths = [text.shape[-1] for text in texts]
        parts = [tokens] if len(texts) == 1 else tokens.split(widths, dim=-1)
        for name, part in zip(group.texts, parts, strict=True):
            changed[name] = insert_rows(arguments[name], part, at=at, dim=group.seq_dim)
    for side in group.extended:
        value = changed.get(side.arg, arguments.get(side.arg))
        if value is not None:
            changed[side.arg] = _grow_part(value, side, at=at, length=length, count=count)
    if group.adjust is not None:
        changed.update(group.adjust({**arguments, **changed}, count))
    return changed


def cut_tokens(group: BlockGroup, arguments: Mapping[str, Any], output: Any, count: int) -> Any:
    """Returns the output of a block without the `count` rows of its soft tokens."""
    if group.returns is None or group.level == "kv":
        return output
    at: int = arguments[group.at] if isinstance(group.at, str) else group.at
    if group.returns == "self":
        return _cut(output, at=at, count=count, dim=group.seq_dim)
    return tuple(
        _cut(part, at=at, count=count, dim=group.seq_dim) if index == group.returns and part is not None else part
        for index, part in enumerate(output)
    )


def insert_rows(text: Any, tokens: Tensor, *, at: int, dim: int = 1) -> Any:
    """Returns a text stream with `tokens`, `(batch or 1, K, D)`, inserted before row `at` of dimension `dim`."""
    if isinstance(text, (tuple, list)):  # IP-Adapter: (text, image tokens)
        return type(text)([insert_rows(text[0], tokens, at=at, dim=dim), *text[1:]])
    rows = tokens.to(device=text.device, dtype=text.dtype)
    if text.ndim == 2:  # no batch: (sequence, D)
        rows = rows.squeeze(0)
    else:
        batch = text.shape[1 - dim]
        if rows.shape[0] == 1:
            rows = rows.expand(batch, -1, -1)
        elif batch == 1:  # one text for several latents, which the block would broadcast, but tokens for each latent
            text = text.expand(*(rows.shape[0] if axis == 1 - dim else -1 for axis in range(text.ndim)))
        elif rows.shape[0] != batch:  # a block may see each row several times, as frames
            rows = rows.repeat_interleave(batch // rows.shape[0], dim=0)
        if dim == 0:
            rows = rows.transpose(0, 1)  # (K, batch, D)
    return torch.cat([text.narrow(dim, 0, at), rows, text.narrow(dim, at, text.shape[dim] - at)], dim=dim)


def _stream(text: Any) -> Any:
    """Returns the text tensor of an argument that may be a tuple with image conditions behind it."""
    return text[0] if isinstance(text, (tuple, list)) else text


def _grow_part(value: Any, side: ExtendedArgument, *, at: int, length: int, count: int) -> Any:
    """Returns an argument with the part of it that `side` names grown, as a new tuple, list or dict."""
    if side.select is None:
        return _grow_each(value, side, at=at, length=length, count=count)
    if isinstance(value, Mapping):
        part = value.get(str(side.select))
        if part is None:
            return value
        return {**value, side.select: _grow_each(part, side, at=at, length=length, count=count)}
    return type(value)(
        [
            _grow_each(part, side, at=at, length=length, count=count) if index == side.select else part
            for index, part in enumerate(value)
        ]
    )


def _grow_each(value: Any, side: ExtendedArgument, *, at: int, length: int, count: int) -> Any:
    """Returns `value`, or each tensor in the tuple or list that it is, grown."""
    if value is None or not side.each:
        return _grow(value, side, at=at, length=length, count=count)
    return type(value)([_grow(part, side, at=at, length=length, count=count) for part in value])


def _grow(value: Tensor | None, side: ExtendedArgument, *, at: int, length: int, count: int) -> Tensor | None:
    """Returns `value` with `count` rows more along its sequence; `length` is that of the text without them."""
    if value is None or (side.per_token and not (value.ndim > 2 and value.shape[side.dim] == length)):
        return value
    size = value.shape[side.dim]
    first = size - length if side.where == "text_last" else 0  # row of the first text token
    before = size if side.where == "end" else first + at
    grown = _grow_dim(value, side.dim, first=first, before=before, count=count, fill=side.fill)
    return (
        _grow_dim(grown, side.dim - 1, first=first, before=before, count=count, fill=side.fill) if side.full else grown
    )


def _grow_dim(value: Tensor, dim: int, *, first: int, before: int, count: int, fill: str | float) -> Tensor:
    row = value.narrow(dim, first, 1)
    if fill == "identity":
        row = _no_rotation(row)
    elif not isinstance(fill, str):
        row = torch.full_like(row, fill)
    head, tail = value.narrow(dim, 0, before), value.narrow(dim, before, value.shape[dim] - before)
    return torch.cat([head, row.repeat_interleave(count, dim=dim), tail], dim=dim)


def _no_rotation(row: Tensor) -> Tensor:
    """Returns the rotary row of the identity rotation: complex ones, or identity matrices `(..., 2, 2)`."""
    if row.is_complex():
        return torch.ones_like(row)
    return torch.eye(2, device=row.device, dtype=row.dtype).expand_as(row)


def _cut(value: Tensor, *, at: int, count: int, dim: int) -> Tensor:
    """Returns a text stream without the `count` rows that were inserted at `at`."""
    tail = value.narrow(dim, at + count, value.shape[dim] - at - count)
    rest = tail if at == 0 else torch.cat([value.narrow(dim, 0, at), tail], dim=dim)
    return rest.contiguous()  # as the block itself returns it: compiled code relies on strides
