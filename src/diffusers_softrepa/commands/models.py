"""The options of the pipeline, and how it is loaded."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ..compat import pipeline_precision
from ..evaluation.scoring import processes
from ..quoting import one_line
from .settings import needed, option

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass
class PipelineOptions:
    """Options of the pipeline."""

    pipeline: str = needed("Pipeline to load: a Hugging Face Hub id, or a folder that save_pretrained wrote.")
    revision: str | None = option("Branch, tag or commit of the pipeline on the Hub.")
    variant: str | None = option("Variant of the pipeline's files, such as fp16.")
    dtype: Precision = option("Precision that the pipeline is loaded in.", "float32")
    device: str | None = option(
        "Device, such as cuda or cpu; the accelerator unless given, or the CPU where there is none."
    )
    token: str | None = option("Hub token; the stored one unless given.")


def load_pipeline(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    token: str | None = None,
    **more: Any,
) -> Any:
    """Returns a pipeline that `DiffusionPipeline.from_pretrained` loads.

    Args:
        source: Hub id or folder.
        revision: Branch, tag or commit on the Hub. Defaults to `main`.
        variant: Variant of the files, such as `fp16`.
        dtype: Name of a torch dtype. Defaults to that of the library.
        token: Hub token. Defaults to the stored one.
        more: Further arguments of `from_pretrained`.
    """
    given = {"revision": revision, "variant": variant, "token": token} | more
    if dtype is not None:
        given |= pipeline_precision(getattr(torch, dtype))
    return DiffusionPipeline.from_pretrained(
        source, **{key: value for key, value in given.items() if value is not None}
    )


def placed_pipeline(options: PipelineOptions) -> Any:
    """Returns the pipeline that options describe, on its device and without progress bars.

    Raises:
        ValueError: There is no such device.
    """
    device = options.device or processes().device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {one_line(error)}") from error
    pipe = load_pipeline(
        options.pipeline,
        revision=options.revision,
        variant=options.variant,
        dtype=options.dtype,
        token=options.token,
    )
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
