"""What training asks of a pipeline: sizes it can take, an adapter, and how its models stand until training ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapter import adapters_of
from ..conditioning import Conditioner
from ..config import SoftREPAConfig
from ..denoisers import check_passes_gradients
from ..pipeline import add_softrepa, denoiser_of, set_softrepa
from .arguments import ContrastiveFlowMatchingArguments
from .data.image import Framing


def make_framing(args: ContrastiveFlowMatchingArguments, conditioner: Conditioner) -> Framing:
    """Returns how images become pixels.

    Raises:
        ValueError: The denoiser cannot take images of these sizes.
    """
    framing = Framing(
        args.resolution,
        args.aspect_buckets,
        multiple_of=conditioner.image_multiple,
        crop="random" if args.random_crop else "center",
        flip=args.random_flip,
    )
    for size in framing.sizes:
        conditioner.latent_shape(*size)
    return framing


def choose_adapter(
    pipeline: Any,
    args: ContrastiveFlowMatchingArguments,
    config: SoftREPAConfig | None,
    name: str | None,
    *,
    num_banks: int,
) -> str:
    """Returns the name of the adapter to train, which is active alone from then on; adds it if there is none.

    Without config and name, the one active adapter is trained on if it requires gradients.

    Raises:
        ValueError: The adapter is there already and has another number of banks, or a config is given for it.
    """
    denoiser = denoiser_of(pipeline)
    check_passes_gradients(denoiser)
    present = adapters_of(denoiser)
    active = [] if present is None else list(present.weights)
    if name is None and config is None and present is not None and len(active) == 1:
        name = active[0] if present[active[0]].tokens.tokens.requires_grad else None
    if present is None or name is None or name not in present.names:
        config = replace(config or SoftREPAConfig.for_denoiser(denoiser), num_banks=num_banks)
        return add_softrepa(pipeline, config, name, generator=torch.Generator().manual_seed(args.seed))
    if config is not None:
        raise ValueError(
            f"adapter {name!r} is there already, with a config of its own; leave out adapter_config to train it on, "
            "or choose another adapter_name"
        )
    if present[name].config.num_banks != num_banks:
        raise ValueError(
            f"objective={args.objective!r} trains {num_banks} token bank(s), but adapter {name!r} has "
            f"{present[name].config.num_banks}; train a fresh adapter"
        )
    set_softrepa(pipeline, name)
    present[name].tokens.requires_grad_()
    return name


@contextmanager
def prepared(pipeline: Any, args: ContrastiveFlowMatchingArguments, device: torch.device) -> Iterator[None]:
    """Puts a pipeline where and how it is trained, while it lasts.

    All of it is frozen, in evaluation mode and on `device`, unless it is offloaded or spread over devices; in mixed
    precision the denoiser and the text encoders are halved, the VAE is not. Afterwards gradient checkpointing is as it
    was.
    """
    denoiser: Any = denoiser_of(pipeline)
    for part in _models(pipeline).values():
        part.requires_grad_(False).eval()
    if pipeline.hf_device_map is None and not any(hasattr(part, "_hf_hook") for part in _models(pipeline).values()):
        pipeline.to(device)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision or "no")
    if half is not None:
        _cast(denoiser, half)
        for name, part in _models(pipeline).items():
            if name.startswith("text_encoder"):
                _cast(part, half)
    was_checkpointing = denoiser.is_gradient_checkpointing
    if args.gradient_checkpointing and not was_checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if args.gradient_checkpointing and not was_checkpointing:
            denoiser.disable_gradient_checkpointing()


def halve_vae(pipeline: Any) -> None:
    """Brings the VAE to the denoiser's precision where that was halved, since pipelines sample in one precision."""
    denoiser: Any = denoiser_of(pipeline)
    dtype = denoiser.dtype
    if dtype in (torch.float16, torch.bfloat16) and (vae := _models(pipeline).get("vae")) is not None:
        _cast(vae, dtype)


def _models(pipeline: Any) -> dict[str, Any]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _cast(part: Any, dtype: torch.dtype) -> None:
    """Casts a model; diffusers warns of layers to keep in float32 even where there are none."""
    if getattr(part, "_keep_in_fp32_modules", None):
        part.to(dtype)
    else:
        torch.nn.Module.to(part, dtype)
