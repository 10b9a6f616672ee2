"""Which rows of a denoiser call belong to the negative branch of classifier-free guidance.

Guidance predicts the noise under the positive and under the negative prompt. A diffusers pipeline makes either two
denoiser calls, each inside `denoiser.cache_context("cond")` or `("uncond")`, or one call whose batch holds the rows of
both. The name of the context answers the first case. In the second, and in pipelines that open no context, the answer
is in the pipeline that runs: its `__call__` keeps the embedded negative prompt in the local variable
`negative_prompt_embeds`, and rows whose text equals it are the negative ones. Nothing else in a denoiser call tells
the branches apart, and the order of the rows differs among pipelines.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .quoting import quoted

GuidanceBranch = Literal["both", "positive"]

_POSITIVE_CONTEXTS, _NEGATIVE_CONTEXTS = ("cond", "pred_cond"), ("uncond", "pred_uncond")
_NEGATIVE_TEXT = "negative_prompt_embeds"


def checked_branch(branch: Any) -> GuidanceBranch:
    """Returns `branch`.

    Raises:
        ValueError: It is neither `"both"` nor `"positive"`.
    """
    if branch not in get_args(GuidanceBranch):
        raise ValueError(f'guidance_branch must be "both" or "positive", but is {quoted(branch)}')
    return branch


def negative_rows(denoiser: nn.Module, context: str | None, arguments: Mapping[str, Any]) -> bool | Tensor:
    """Returns which rows of a denoiser call belong to the negative branch.

    Args:
        denoiser: The module that is called.
        context: Name of the cache context in which it is called, None outside of any.
        arguments: The arguments of the call by name.

    Returns:
        True for all rows, False for none, otherwise bool of shape `(rows of the text,)` on the CPU.

    Raises:
        ValueError: Neither the context nor the running pipeline tells the branches apart.
    """
    if context in _POSITIVE_CONTEXTS or context in _NEGATIVE_CONTEXTS:
        return context in _NEGATIVE_CONTEXTS
    return _rows_by_text(denoiser, arguments)


def select_rows(negative: Tensor, base: Any, adapted: Any) -> Any:
    """Returns a block's output with the rows of the negative branch from `base` and all others from `adapted`.

    Args:
        negative: Bool, `(rows,)`. A block may see each row several times, as frames.
        base: Output without soft tokens; tensors with the batch first, or tuples of them.
        adapted: Output with soft tokens, of the same structure.

    Raises:
        ValueError: The output has no batch dimension of these rows.
    """
    if isinstance(adapted, (tuple, list)):
        return type(adapted)([select_rows(negative, *parts) for parts in zip(base, adapted, strict=True)])
    if not isinstance(adapted, Tensor):
        return adapted
    size = adapted.shape[0]
    if size % len(negative):
        raise ValueError(
            f"guidance_branch='positive' needs blocks with a row for each of the {len(negative)} texts, but a block "
            f"returned {size} rows; use guidance_branch='both'"
        )
    mask = negative.to(adapted.device).repeat_interleave(size // len(negative))
    return torch.where(mask.view(size, *[1] * (adapted.ndim - 1)), base, adapted)


def _cannot(denoiser: nn.Module, reason: str) -> str:
    return (
        f"guidance_branch='positive' needs to know which rows {type(denoiser).__name__} gets for the negative prompt, "
        f"but {reason}; set_softrepa(..., guidance_branch='both')"
        + (', or call it inside cache_context("cond") or ("uncond")' if hasattr(denoiser, "cache_context") else "")
    )


@torch.compiler.disable  # a compiled graph has no frames to look into: it breaks here
def _rows_by_text(denoiser: nn.Module, arguments: Mapping[str, Any]) -> bool | Tensor:
    found = _pipeline_call(denoiser)
    if found is None:
        raise ValueError(_cannot(denoiser, "no pipeline calls it, and a denoiser alone has no guidance"))
    pipe, variables = found
    texts = list(_texts(variables))
    guided = variables.get("do_classifier_free_guidance", getattr(pipe, "do_classifier_free_guidance", None))
    if not texts and (guided is False or (guided is None and "negative_prompt" not in variables)):
        return False
    for negative, positive in texts:
        for value in arguments.values():
            rows = _rows_equal(value, negative, positive, variables.get("latents"))
            if rows is not None:
                return rows
    raise ValueError(
        _cannot(denoiser, f"the text that {type(pipe).__name__} passes to it cannot be told from the negative one")
    )


def _pipeline_call(denoiser: nn.Module) -> tuple[Any, Mapping[str, Any]] | None:
    """Returns the pipeline whose `__call__` runs this denoiser, with the variables of that call; None without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and "self" in frame.f_code.co_varnames:
            variables = frame.f_locals
            pipe = variables.get("self")
            if isinstance(pipe, DiffusionPipeline) and any(
                getattr(part, "_orig_mod", part) is denoiser for part in vars(pipe).values()
            ):
                return pipe, variables
        frame = frame.f_back
    return None


def _texts(variables: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields each embedded negative prompt of a pipeline call, with the positive one that stands beside it."""
    for name, value in variables.items():
        if name.startswith(_NEGATIVE_TEXT) and "mask" not in name and value is not None and len(value):
            yield value, variables.get(name.removeprefix("negative_"))


def _rows_equal(value: Any, negative: Any, positive: Any, latents: Any) -> bool | Tensor | None:
    """Returns which rows of an argument are the negative text; None where the argument does not tell."""
    if not isinstance(value, list) and not (isinstance(value, Tensor) and value.ndim > 1):
        return None
    count = len(negative)
    if len(value) == 0 or len(value) % count:
        return None
    if len(value) == count:  # one call for each branch
        if value is negative or value is positive:
            return value is negative
        alike = _equal(value, negative), _equal(value, positive)
        return alike[0] if alike[0] != alike[1] else None
    if isinstance(latents, Tensor) and len(latents) >= len(value):
        return None  # one negative prompt beside several positive ones
    equal = [_equal(value[start : start + count], negative) for start in range(0, len(value), count)]
    return torch.tensor(equal).repeat_interleave(count) if any(equal) and not all(equal) else None


def _equal(text: Any, other: Any) -> bool:
    """Whether two embedded texts, tensors or lists of one tensor for each row, hold the same numbers."""
    if isinstance(text, Tensor) and isinstance(other, Tensor):
        return text.shape == other.shape and torch.equal(text, other.to(text.device, text.dtype))
    if isinstance(text, Sequence) and isinstance(other, Sequence):
        return len(text) == len(other) and all(map(_equal, text, other))
    return False
