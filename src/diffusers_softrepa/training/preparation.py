"""How a pipeline is prepared for training: image sizes, the adapter, and the device and precision of its models."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..adapter import adapters_of
from ..conditioning import Conditioner
from ..config import SoftREPAConfig
from ..denoisers import check_passes_gradients
from ..pipeline import add_softrepa, denoiser_of, set_softrepa
from .arguments import ContrastiveFlowMatchingArguments
from .data.image import Framing

logger = logging.getLogger(__name__)


def make_framing(args: ContrastiveFlowMatchingArguments, conditioner: Conditioner) -> Framing:
    """Returns the sizes and crops of the training images.

    Raises:
        ValueError: The denoiser does not take images of one of these sizes.
    """
    framing = Framing(
        args.resolution,
        args.aspect_buckets,
        multiple_of=conditioner.image_multiple,
        random_crop=args.random_crop,
        flip=args.random_flip,
        further_resolutions=tuple(args.further_resolutions),
    )
    config: Any = conditioner.denoiser.config
    limit = getattr(config, "pos_embed_max_size", None)  # in patches of a side, as SD3 has it
    for height, width in framing.sizes:
        _, latent_height, latent_width = conditioner.latent_shape(height, width)
        if limit is not None and max(latent_height, latent_width) > limit * config.patch_size:
            most = limit * config.patch_size * (height // latent_height)
            raise ValueError(
                f"{type(conditioner.denoiser).__name__} takes images of up to {most} px a side, but resolution="
                f"{args.resolution} makes images of {height} x {width} px; set a smaller resolution"
            )
    return framing


def choose_adapter(
    pipeline: Any,
    args: ContrastiveFlowMatchingArguments,
    config: SoftREPAConfig | None,
    name: str | None,
    *,
    num_banks: int,
) -> str:
    """Returns the name of the adapter to train, after adding it if need be and making it the only active one.

    Without `config` and `name`, the active adapter is trained further if it is the only one and requires gradients.

    Raises:
        ValueError: Gradients do not pass the denoiser, or the named adapter exists and has another number of token
            banks, or a config is given for it.
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
    """Prepares a pipeline for training inside the block.

    All models are frozen and in evaluation mode, and moved to `device`, except those that are offloaded, spread over
    devices or quantised to 8 or 4 bits. With `cache_text` the text encoders are moved only when the block ends. In
    mixed precision the denoiser and the text encoders are cast, unless they are quantised; the VAE is not. Without it
    the text encoders get the denoiser's precision.
    Afterwards gradient checkpointing and compilation are as they were before.

    Raises:
        ValueError: The denoiser is group-offloaded in another precision than `mixed_precision`.
    """
    denoiser: Any = denoiser_of(pipeline)
    models = _models(pipeline)
    encoders = [name for name in models if name.startswith("text_encoder")]
    for part in models.values():
        part.requires_grad_(False).eval()
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision or "no")
    for part in (denoiser, *(models[name] for name in encoders)):
        if half is not None or (part is not denoiser and not _is_offloaded(part)):
            _cast(part, half or denoiser.dtype)  # a pipeline draws in one precision
    waiting = encoders if args.cache_text else []
    _place(pipeline, [name for name in models if name not in waiting], device)
    was_checkpointing = denoiser.is_gradient_checkpointing
    if args.gradient_checkpointing and not was_checkpointing:
        denoiser.enable_gradient_checkpointing()
    compiled = {part: part._compiled_call_impl for part in denoiser.modules()}
    if args.torch_compile:
        how = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        denoiser.compile(**{name: value for name, value in how.items() if value is not None})
    try:
        with _weights_for_backward(denoiser):
            yield
    finally:
        for part, impl in compiled.items():
            part._compiled_call_impl = impl
        if args.gradient_checkpointing and not was_checkpointing:
            denoiser.disable_gradient_checkpointing()
        try:
            _place(pipeline, waiting, device)
        except torch.OutOfMemoryError:
            _place(pipeline, waiting, torch.device("cpu"))
            logger.warning("the text encoders do not fit on %s beside the rest: they stay on the CPU", device)


@contextmanager
def text_encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Moves the text encoders to a device inside the block, unless they are offloaded, and back afterwards."""
    where = {
        name: next(part.parameters()).device
        for name, part in _models(pipeline).items()
        if name.startswith("text_encoder") and next(part.parameters(), None) is not None
    }
    try:
        _place(pipeline, where, device)
        yield
    finally:
        for name, former in where.items():
            _place(pipeline, [name], former)
        if any(former != device for former in where.values()) and device.type == "cuda":
            torch.cuda.empty_cache()


def _weights_for_backward(denoiser: Any) -> AbstractContextManager[Any]:
    """Lets gradients pass an offloaded denoiser inside the block.

    Offloading removes the weights from the parameters after each block, but the backward pass needs them, so the graph
    keeps the tensors that the parameters held. With gradient checkpointing these are one block's weights at a time.
    """
    if not _is_offloaded(denoiser):
        return nullcontext()
    return saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


def halve_vae(pipeline: Any) -> None:
    """Casts the VAE to the denoiser's half precision, since a pipeline samples in one precision."""
    denoiser: Any = denoiser_of(pipeline)
    dtype = denoiser.dtype
    if dtype in (torch.float16, torch.bfloat16) and (vae := _models(pipeline).get("vae")) is not None:
        _cast(vae, dtype)


def _models(pipeline: Any) -> dict[str, Any]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _place(pipeline: Any, names: Iterable[str], device: torch.device) -> None:
    """Moves models of a pipeline, except those that offloading, a device map or their quantisation keeps in place."""
    models = _models(pipeline)
    if pipeline.hf_device_map is not None or any(hasattr(part, "_hf_hook") for part in models.values()):
        return
    for part in (models[name] for name in names):
        fixed = getattr(part, "is_loaded_in_8bit", False) or getattr(part, "is_loaded_in_4bit", False)
        if not fixed and not _is_group_offload_enabled(part):
            torch.nn.Module.to(part, device)


def _is_offloaded(part: torch.nn.Module) -> bool:
    return _is_group_offload_enabled(part) or any(hasattr(inner, "_hf_hook") for inner in part.modules())


def _is_quantised(part: torch.nn.Module) -> bool:
    return getattr(part, "hf_quantizer", None) is not None or any(
        type(weight.data) is not Tensor and not isinstance(weight.data, torch.nn.Parameter)
        for weight in part.parameters()
    )


def _cast(part: Any, dtype: torch.dtype) -> None:
    """Casts a model that is not quantised; diffusers warns of layers to keep in float32 even where there are none."""
    if _is_quantised(part):
        return
    if _is_group_offload_enabled(part):
        if part.dtype != dtype:
            raise ValueError(
                f"{type(part).__name__} is offloaded in {part.dtype}, but mixed_precision asks for {dtype}; load the "
                f"pipeline with dtype={dtype}, or cast it, before offloading"
            )
        return
    if getattr(part, "_keep_in_fp32_modules", None):
        part.to(dtype)
    else:
        torch.nn.Module.to(part, dtype)
