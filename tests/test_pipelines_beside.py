"""Soft tokens beside what else a pipeline can carry: IP-Adapter, ControlNet, textual inversion, other guidance, other
pipelines of the same model, copies."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
import zoo_pipelines
from diffusers_softrepa import SoftREPAConfig, load_softrepa, softrepa_parameters

# FluxControlNetModel warns of its own positions.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
every_unet = pytest.mark.parametrize("family", tiny.FAMILIES[:2], ids=lambda family: family.name)


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    return pipe.components.get("unet") or pipe.transformer


def load_tokens(target: Any, *, scale: float = 1.0, **fields: Any) -> dict[str, Tensor]:
    """Loads a random adapter, the same whenever the config is; returns its tensors."""
    denoiser = target if isinstance(target, nn.Module) else denoiser_of(target)
    config = SoftREPAConfig.for_denoiser(denoiser, **fields)
    generator = torch.Generator().manual_seed(7)
    tensors = {name: scale * torch.randn(shape, generator=generator) for name, shape in config.shapes.items()}
    load_softrepa(target, tensors, config=config)
    return tensors


def generate(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> Tensor:
    """Returns a picture; some pipelines draw from the global generator as well."""
    if type(pipe).__name__.startswith(("Flux", "StableDiffusion3")):
        kwargs.setdefault("max_sequence_length", tiny.MAX_LENGTH)
    torch.manual_seed(5)
    return tiny.generate(pipe, *args, **kwargs)


def check_tokens_tell_and_leave_no_trace(pipe: DiffusionPipeline, **kwargs: Any) -> None:
    """The law of every pipeline: tokens change the picture, and without them it is what it was."""
    before = generate(pipe, **kwargs)
    load_tokens(pipe)
    after = generate(pipe, **kwargs)
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4
    pipe.disable_softrepa()
    assert torch.equal(generate(pipe, **kwargs), before)
    pipe.enable_softrepa()
    assert torch.equal(generate(pipe, **kwargs), after)
    pipe.unload_softrepa()
    assert torch.equal(generate(pipe, **kwargs), before)


# Loading


@every_family
def test_loading_an_adapter_draws_nothing_from_the_global_generator(family: tiny.Family):
    pipe = family.pipeline()
    before = torch.get_rng_state()
    load_tokens(pipe)
    assert torch.equal(torch.get_rng_state(), before)


@every_family
def test_an_adapter_with_timestep_bins_and_one_without_are_active_at_once(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    timesteps = torch.tensor([150.0, 950.0])
    load_tokens(denoiser, num_timestep_bins=10)
    load_tokens(denoiser, num_timestep_bins=None, num_tokens=3)
    denoiser.set_softrepa(["softrepa", "softrepa_1"])
    both = family.call(denoiser, inputs, timesteps)
    for index, timestep in enumerate(timesteps):
        assert_close(family.call(denoiser, tiny.row(inputs, index), timestep)[0], both[index])
    denoiser.set_softrepa("softrepa")
    assert (family.call(denoiser, inputs, timesteps) - both).abs().max() > 1e-4


# IP-Adapter


IMAGE_TOKENS, IMAGE_WIDTH = 4, 10


def unet_ip_adapter(unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A random IP-Adapter as its files hold it: a projection of the image, a key and a value for each attn2."""
    width = unet.config.cross_attention_dim
    image_proj = {
        "proj.weight": torch.randn(IMAGE_TOKENS * width, IMAGE_WIDTH),
        "proj.bias": torch.randn(IMAGE_TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    ip_adapter = {
        f"{2 * index + 1}.{kind}.weight": torch.randn(unet.get_submodule(name).to_k.out_features, width) * 0.2
        for index, name in enumerate(attentions)
        for kind in ("to_k_ip", "to_v_ip")
    }
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


def load_ip_adapter(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Gives the pipeline an IP-Adapter, and returns the argument of a call that uses it."""
    torch.manual_seed(11)
    state = unet_ip_adapter(pipe.unet)
    pipe.unet._load_ip_adapter_weights([state])  # pipe.load_ip_adapter without its image processor
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, IMAGE_WIDTH)]}


@every_unet
def test_tokens_beside_an_ip_adapter_equal_tokens_in_the_prompt(family: tiny.Family):
    """Cross-attention knows no positions: what every block is given could as well stand in the prompt embeddings."""
    pipe = family.pipeline()
    image = load_ip_adapter(pipe)
    stages = ["down", "mid", "up"]
    tokens = load_tokens(pipe, stages=stages, num_timestep_bins=None)["tokens"]  # (1, K, D)
    prompt = {name: torch.randn(1, 9, pipe.unet.config.cross_attention_dim) for name in ("positive", "negative")}
    pooled = {
        f"{sign}pooled_prompt_embeds": torch.randn(1, tiny.WIDTH) for sign in ("", "negative_") if "xl" in family.name
    }

    def draw(change: Callable[[Tensor], Tensor]) -> Tensor:
        embeds = {"prompt_embeds": change(prompt["positive"]), "negative_prompt_embeds": change(prompt["negative"])}
        return generate(pipe, None, **embeds, **pooled, **image)

    with_tokens = draw(lambda text: text)
    pipe.unload_softrepa()
    assert_close(draw(lambda text: torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)), with_tokens)
    assert (draw(lambda text: text) - with_tokens).abs().max() > 1e-4


@every_unet
def test_an_ip_adapter_may_come_and_go_around_tokens(family: tiny.Family):
    pipe, other = family.pipeline(), family.pipeline()
    other.unet.load_state_dict(pipe.unet.state_dict())
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipe.components:
            setattr(other, name, getattr(pipe, name))
    load_tokens(pipe)
    alone = generate(pipe)
    image = load_ip_adapter(pipe)
    assert load_ip_adapter(other).keys() == image.keys()
    load_tokens(other)
    both = generate(pipe, **image)
    assert torch.equal(generate(other, **image), both)
    assert (both - alone).abs().max() > 1e-4
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe), alone)


def test_tokens_beside_an_ip_adapter_of_sd3():
    family = tiny.FAMILIES[2]
    denoiser, inputs = family.denoiser(), family.inputs(2)
    width = denoiser.inner_dim
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(width, ip_hidden_states_dim=10, head_dim=16, timesteps_emb_dim=width)
        if name.startswith("transformer_blocks") and "attn2" not in name
        else JointAttnProcessor2_0()
        for name in denoiser.attn_processors
    }
    image = {"ip_hidden_states": torch.randn(2, IMAGE_TOKENS, 10)}

    def call() -> Tensor:
        extra = {"joint_attention_kwargs": dict(image, temb=torch.ones(2, width))}
        return denoiser(**inputs, **extra, timestep=torch.full((2,), 500.0), return_dict=False)[0]

    denoiser.set_attn_processor(processors)
    before = call()
    load_tokens(denoiser)
    after = call()
    image["ip_hidden_states"] = torch.randn(2, IMAGE_TOKENS, 10)
    assert len({before.sum().item(), after.sum().item(), call().sum().item()}) == 3


def test_tokens_beside_an_ip_adapter_of_flux():
    family = tiny.FAMILIES[3]
    denoiser, inputs = family.denoiser(), family.inputs(2)
    width, text = denoiser.inner_dim, denoiser.config.joint_attention_dim
    state = {"image_proj": {"proj.weight": torch.randn(IMAGE_TOKENS * text, IMAGE_WIDTH)}, "ip_adapter": {}}
    state["image_proj"] |= {"proj.bias": torch.randn(IMAGE_TOKENS * text)}
    state["image_proj"] |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    for index in range(denoiser.config.num_layers):
        for kind in ("to_k_ip", "to_v_ip"):
            state["ip_adapter"] |= {f"{index}.{kind}.weight": torch.randn(width, text) * 0.2}
            state["ip_adapter"] |= {f"{index}.{kind}.bias": torch.zeros(width)}

    def call(image: Tensor | None) -> Tensor:
        extra = {} if image is None else {"joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}}
        return denoiser(**inputs, **extra, timestep=torch.full((2,), 0.5), return_dict=False)[0]

    load_tokens(denoiser)
    alone = call(None)
    denoiser._load_ip_adapter_weights([state])
    image = torch.randn(2, 1, IMAGE_WIDTH)
    both = call(image)
    denoiser.unload_softrepa()
    plain = call(image)
    assert len({alone.sum().item(), both.sum().item(), plain.sum().item()}) == 3
    load_tokens(denoiser)
    assert torch.equal(call(image), both)


# Textual inversion


@every_unet
def test_textual_inversion_and_tokens_come_in_any_order(family: tiny.Family):
    word = torch.randn(tiny.WIDTH)
    pictures = []
    for tokens_first in (True, False):
        torch.manual_seed(0)
        pipe = family.pipeline()
        plain = generate(pipe, "a red <cat>")
        if tokens_first:
            load_tokens(pipe)
        pipe.load_textual_inversion({"<cat>": word})
        if not tokens_first:
            load_tokens(pipe)
        pictures.append(generate(pipe, "a red <cat>"))
        assert pipe.get_softrepa_adapters() == {"softrepa": 1.0}
        pipe.unload_softrepa()
        inverted = generate(pipe, "a red <cat>")
        load_tokens(pipe)
        pipe.unload_textual_inversion()
        assert pipe.get_softrepa_adapters() == {"softrepa": 1.0}
        assert (inverted - plain).abs().max() > 1e-5
        assert (inverted - pictures[-1]).abs().max() > 1e-5
    assert torch.equal(*pictures)


# ControlNet


def controlnet_pipeline(family: tiny.Family, pipe: DiffusionPipeline) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Returns a pipeline with a random ControlNet on the same denoiser, and the arguments of a call."""
    image = {"image": torch.rand(1, 3, 16, 16)}
    components = dict(pipe.components)
    if family.name in ("sd15", "sdxl"):
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
        kind = StableDiffusionXLControlNetPipeline if family.name == "sdxl" else StableDiffusionControlNetPipeline
    elif family.name == "sd3":
        net = SD3ControlNetModel.from_transformer(copy.deepcopy(pipe.transformer), 2, 0)
        kind, image = StableDiffusion3ControlNetPipeline, {"control_image": image["image"]}
    else:
        net = FluxControlNetModel.from_transformer(pipe.transformer, 1, 1, 16, 3)
        kind, image = FluxControlNetPipeline, {"control_image": image["image"]}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "controlnet" in name or "pos_embed_input" in name:  # zero as it comes, hence without effect
                parameter.normal_(0.0, 0.3)
    return kind(**components, controlnet=net.eval()), image


def residuals_of(net: nn.Module, draw: Callable[[], Any]) -> list[Tensor]:
    """Returns what the ControlNet gave to the denoiser while a picture was drawn."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        for part in output:
            seen.extend(part if isinstance(part, list | tuple) else [part] if part is not None else [])

    handle = net.register_forward_hook(keep)
    try:
        draw()
    finally:
        handle.remove()
    assert seen
    return seen


@every_family
def test_tokens_beside_a_controlnet(family: tiny.Family):
    pipe, image = controlnet_pipeline(family, family.pipeline())
    check_tokens_tell_and_leave_no_trace(pipe, **image)
    base = residuals_of(pipe.controlnet, lambda: generate(pipe, steps=1, **image))
    plain = generate(pipe, **image)
    load_tokens(pipe)
    # The ControlNet reads the text without tokens, and its residuals reach the blocks with them.
    with_tokens = residuals_of(pipe.controlnet, lambda: generate(pipe, steps=1, **image))
    assert all(torch.equal(x, y) for x, y in zip(base, with_tokens, strict=True))
    guided = generate(pipe, **image)
    assert (generate(pipe, **image, controlnet_conditioning_scale=0.0) - guided).abs().max() > 1e-4
    assert (guided - plain).abs().max() > 1e-4


@every_family
def test_a_controlnet_without_effect_leaves_tokens_what_they_are_alone(family: tiny.Family):
    pipe = family.pipeline()
    load_tokens(pipe)
    noise = torch.randn(1, 16, 16) if family.name == "flux" else torch.randn(1, 4, 8, 8)
    alone = generate(pipe, latents=noise)
    guided, image = controlnet_pipeline(family, pipe)
    assert guided.get_softrepa_adapters() == {"softrepa": 1.0}
    assert_close(generate(guided, latents=noise, **image, controlnet_conditioning_scale=0.0), alone)
    assert torch.equal(generate(pipe, latents=noise), alone)


@every_family
def test_a_controlnet_made_from_a_denoiser_with_tokens_has_none(family: tiny.Family):
    pipe = family.pipeline()
    torch.manual_seed(1)
    plain = controlnet_pipeline(family, pipe)[0].controlnet
    load_tokens(pipe)
    torch.manual_seed(1)
    net = controlnet_pipeline(family, pipe)[0].controlnet
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert not any("softrepa" in name for module in net.modules() for name in vars(module))


# Other pipelines of the same model


IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
MASK = (torch.arange(16) > 8).float().expand(1, 1, 16, 16)

OTHERS = {
    "sd15": (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPAGPipeline),
    "sdxl": (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPAGPipeline),
    "sd3": (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline, StableDiffusion3PAGPipeline),
    "flux": (FluxImg2ImgPipeline, FluxInpaintPipeline),
}

every_other = pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in tiny.FAMILIES for kind in OTHERS[family.name]],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)


def pipeline_for(family: tiny.Family, kind: type) -> DiffusionPipeline:
    pipe = family.pipeline()
    if kind is StableDiffusion3InpaintPipeline:  # knows latents of 16 channels only
        pipe.vae = tiny.vae(16, shift=True)
        config = dict(pipe.transformer.config) | {"in_channels": 16, "out_channels": 16}
        pipe.transformer = type(pipe.transformer).from_config(config).eval()
    return kind.from_pipe(pipe)


def arguments_of(kind: type) -> dict[str, Any]:
    """Returns what a call of the pipeline needs besides a prompt."""
    if "Inpaint" in kind.__name__:
        return {"image": IMAGE, "mask_image": MASK, "strength": 1.0}
    sizes = {"height": None, "width": None} if kind is StableDiffusionImg2ImgPipeline else {}
    return {"image": IMAGE, "strength": 1.0} | sizes if "Img2Img" in kind.__name__ else {}


@every_other
def test_tokens_in_another_pipeline_of_the_model(family: tiny.Family, kind: type):
    check_tokens_tell_and_leave_no_trace(pipeline_for(family, kind), **arguments_of(kind))


@every_other
def test_pipelines_of_one_denoiser_share_its_tokens(family: tiny.Family, kind: type):
    other = pipeline_for(family, kind)
    pipe = type(family.pipeline()).from_pipe(other)
    assert denoiser_of(other) is denoiser_of(pipe)
    load_tokens(pipe)
    assert other.get_softrepa_adapters() == {"softrepa": 1.0}
    other.set_softrepa("softrepa", 0.5)
    assert pipe.get_softrepa_adapters() == {"softrepa": 0.5}
    third = kind.from_pipe(pipe)
    assert third.get_softrepa_adapters() == {"softrepa": 0.5}
    third.unload_softrepa()
    assert pipe.get_softrepa_adapters() == other.get_softrepa_adapters() == {}


@pytest.mark.parametrize("start", [0, 2])
def test_skip_layer_guidance_reads_tokens_where_no_layer_is_skipped(start: int):
    """Skipped are blocks 0 (with tokens) and 3; the guided prediction leaves them out, the tokens' rest stays."""
    pipe = tiny.sd3_pipeline()
    skip = {"skip_guidance_layers": [start, 3], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    check_tokens_tell_and_leave_no_trace(pipe, **skip)
    load_tokens(pipe)
    assert (generate(pipe, **skip) - generate(pipe)).abs().max() > 1e-4


def test_tokens_of_skipped_layers_have_no_effect():
    family = tiny.FAMILIES[2]
    denoiser, inputs = family.denoiser(), family.inputs(2)
    skipped = [0, 1]
    before = family.call(denoiser, inputs | {"skip_layers": skipped}, 500)
    load_tokens(denoiser, num_layers=2)
    assert torch.equal(family.call(denoiser, inputs | {"skip_layers": skipped}, 500), before)
    assert not torch.equal(family.call(denoiser, inputs | {"skip_layers": [1]}, 500), before)


# Calls that change how a denoiser computes


UNETS, SD3, FLUX = tiny.FAMILIES[:2], tiny.FAMILIES[2:3], tiny.FAMILIES[3:]
CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[tiny.Family, ...]]] = {
    "freeu": (lambda denoiser: denoiser.enable_freeu(0.9, 0.2, 1.2, 1.4), UNETS),
    "attention processors": (lambda denoiser: denoiser.set_attn_processor(AttnProcessor()), UNETS),
    # Diffusers cannot fuse the second, text-free attention that the small SD3 has.
    "fused projections": (lambda denoiser: denoiser.fuse_qkv_projections(), UNETS + FLUX),
    "chunked feed-forward": (lambda denoiser: denoiser.enable_forward_chunking(1, dim=1), SD3),
    "attention slices": (lambda denoiser: denoiser.set_attention_slice(1), UNETS),
    "channels last": (lambda denoiser: denoiser.to(memory_format=torch.channels_last), UNETS),
    "attention backend": (lambda denoiser: denoiser.set_attention_backend("_native_math"), SD3 + FLUX),
    "float64": (lambda denoiser: denoiser.double(), tiny.FAMILIES),
}


@pytest.mark.parametrize(
    ("family", "change"),
    [(family, change) for change, (_, families) in CHANGES.items() for family in families],
    ids=lambda value: getattr(value, "name", value),
)
def test_tokens_and_changes_of_the_computation_come_in_any_order(family: tiny.Family, change: str):
    inputs, outputs = family.inputs(2), []
    if change == "float64":
        inputs = tiny.mapped(inputs, Tensor.double)
    for tokens_first in (True, False):
        torch.manual_seed(0)
        denoiser = family.denoiser()
        if tokens_first:
            load_tokens(denoiser)
        CHANGES[change][0](denoiser)
        if not tokens_first:
            load_tokens(denoiser)
        outputs.append(family.call(denoiser, inputs, 500))
        denoiser.unload_softrepa()
        assert (family.call(denoiser, inputs, 500) - outputs[-1]).abs().max() > 1e-4
    assert torch.equal(*outputs)


# Copies


@every_family
@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "denoiser"])
def test_a_copy_and_its_original_are_independent(family: tiny.Family, whole: bool):
    pipe = family.pipeline()
    original, inputs = denoiser_of(pipe), family.inputs(2)
    base = family.call(original, inputs, 500)
    load_tokens(original)
    both = family.call(original, inputs, 500)
    copied = denoiser_of(copy.deepcopy(pipe)) if whole else copy.deepcopy(original)
    assert torch.equal(family.call(copied, inputs, 500), both)
    assert copied.get_softrepa_adapters() == {"softrepa": 1.0}

    for changed, kept in ((copied, original), (original, copied)):
        changed.set_softrepa("softrepa", 0.5)
        assert kept.get_softrepa_adapters() == {"softrepa": 1.0}
        assert torch.equal(family.call(kept, inputs, 500), both)
        with torch.no_grad():
            for parameter in softrepa_parameters(changed).values():
                parameter.zero_()
        assert torch.equal(family.call(kept, inputs, 500), both)
        changed.unload_softrepa()
        assert torch.equal(family.call(changed, inputs, 500), base)
        assert torch.equal(family.call(kept, inputs, 500), both)
        load_tokens(changed)
        assert torch.equal(family.call(changed, inputs, 500), both)


@every_family
def test_a_copy_of_one_block_has_no_tokens(family: tiny.Family):
    """As when a ControlNet is built from copies of blocks."""
    denoiser, inputs = family.denoiser(), family.inputs(2)
    load_tokens(denoiser)
    before = family.call(denoiser, inputs, 500)
    container = denoiser.transformer_blocks if hasattr(denoiser, "transformer_blocks") else denoiser.down_blocks
    index = 0 if hasattr(denoiser, "transformer_blocks") else 1
    seen: dict[str, Any] = {}
    handle = container[index].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    family.call(denoiser, inputs, 500)
    handle.remove()
    copied = copy.deepcopy(container[index])
    denoiser.disable_softrepa()
    assert_close(copied(*seen["args"], **seen["kwargs"]), container[index](*seen["args"], **seen["kwargs"]))
    denoiser.enable_softrepa()
    assert torch.equal(family.call(denoiser, inputs, 500), before)


@pytest.mark.parametrize("make", [tiny.flux_pipeline, zoo_pipelines.qwen_pipeline], ids=["flux", "qwen"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_one_negative_prompt_for_several_prompts_is_that_prompt_for_each(make: Any, weight: float):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, init_std=1.0))
    pipe.set_softrepa("softrepa", weight)

    def draw(negative: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
        prompts = ["a red cat", "two dogs"]
        return pipe(prompts, negative_prompt=negative, true_cfg_scale=3.0, generator=generators, **settings).images

    assert_close(draw("no"), draw(["no", "no"]), rtol=1e-4, atol=1e-4)
