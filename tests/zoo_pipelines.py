"""Small random pipelines of the younger image families, of the real diffusers classes; no download."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

import tiny

WIDTH = tiny.WIDTH
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = "a and red cat two dogs tree apples picture view no very long caption user system assistant"
CHAT = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
HEADS: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 16}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A chat tokenizer of whole words; words that it does not know are all the same to it."""
    vocab = {
        word: index for index, word in enumerate([*SPECIAL, "\n", *WORDS.split(), *map(str, range(10)), *".,:!?"])
    }
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **special, extra_special_tokens=list(SPECIAL[4:]), chat_template=CHAT
    )


def _language_model(num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def mistral_encoder() -> nn.Module:
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_language_model(31)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    return Mistral3ForConditionalGeneration(config).eval()


def qwen_vl_encoder() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**_language_model(2), "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 0.5, 3.0],
    ).eval()


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    vae.bn.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    return vae


def dc_autoencoder() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    ).eval()


def flux2_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **HEADS,
    ).eval()


def _shifting_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def flux2_pipeline() -> Flux2Pipeline:
    """FLUX.2 dev. Its processor, which only adds images to what a tokenizer does, is a tokenizer here."""
    return Flux2Pipeline(
        scheduler=_shifting_scheduler(),
        vae=flux2_vae(),
        text_encoder=mistral_encoder(),
        tokenizer=words_tokenizer(),
        transformer=flux2_transformer(guidance_embeds=True),
    )


def flux2_klein_pipeline() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=_shifting_scheduler(),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**_language_model(28))).eval(),
        tokenizer=words_tokenizer(),
        transformer=flux2_transformer(guidance_embeds=False),
    )


def qwen_pipeline() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    return QwenImagePipeline(
        scheduler=_shifting_scheduler(),
        vae=qwen_vae(),
        text_encoder=qwen_vl_encoder(),
        tokenizer=words_tokenizer(),
        transformer=transformer.eval(),
    )


def zimage_pipeline() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[96, 32, 32],
    )
    for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(pad_token)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.vae(4, shift=True),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model(3))).eval(),
        tokenizer=words_tokenizer(),
        transformer=transformer.eval(),
    )


def chroma_pipeline() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    return ChromaPipeline(
        scheduler=_shifting_scheduler(),
        vae=tiny.vae(4, shift=True),
        text_encoder=tiny.t5_encoder(WIDTH),
        tokenizer=tiny.t5_tokenizer(),
        transformer=transformer.eval(),
    )


def sana_pipeline(*, timestep_scale: float = 1.0) -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=WIDTH,
        timestep_scale=timestep_scale,
        **HEADS,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=words_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**_language_model(2))).eval(),
        vae=dc_autoencoder(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def pixart_transformer(*, micro_conditions: bool) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_layers=2,
        cross_attention_dim=48,
        sample_size=128 if micro_conditions else 16,
        caption_channels=WIDTH,
        use_additional_conditions=micro_conditions,
        **HEADS,
    ).eval()


def _pixart_components(*, micro_conditions: bool) -> dict[str, Any]:
    return {
        "tokenizer": tiny.t5_tokenizer(),
        "text_encoder": tiny.t5_encoder(WIDTH),
        "vae": tiny.vae(4),
        "transformer": pixart_transformer(micro_conditions=micro_conditions),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def pixart_alpha_pipeline() -> PixArtAlphaPipeline:
    """PixArt-alpha at 1024 px, which is told the size of the image."""
    return PixArtAlphaPipeline(**_pixart_components(micro_conditions=True))


def pixart_sigma_pipeline() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(**_pixart_components(micro_conditions=False))


@dataclass(frozen=True)
class Entry:
    """One pipeline class under test.

    Attributes:
        make: Makes a small random one.
        shape: Latents (C, h, w) of an image of `size`.
        multiple: What sides of images must be multiples of, in pixels.
        unguided: Arguments of its call that leave out the second branch.
        guided: Arguments of its call that guide, and that a text this short needs.
        length: Text tokens per caption that fit the small tokenizer; None where the pipeline leaves no choice.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    shape: tuple[int, int, int]
    multiple: int
    unguided: dict[str, Any]
    guided: dict[str, Any]
    length: int | None = 40
    size: tuple[int, int] = (16, 24)
    extra: dict[str, Any] = field(default_factory=dict)

    def generate(self, pipe: DiffusionPipeline, prompt: Any, *, steps: int = 2, **kwargs: Any) -> Any:
        """Returns what the pipeline draws of a prompt, as latents unless told otherwise."""
        height, width = self.size
        settings = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "latent"}
        settings |= {} if self.length is None else {"max_sequence_length": self.length}
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            generator=torch.Generator().manual_seed(0),
            **settings | self.extra | kwargs,
        ).images


_BINNED = {"use_resolution_binning": False}
_UNGUIDED, _GUIDED = {"guidance_scale": 1.0}, {"guidance_scale": 3.0}
ELDERS = {
    entry.name: entry
    for entry in (
        Entry("sd15", tiny.sd15_pipeline, (4, 8, 12), 2, _UNGUIDED, _GUIDED, length=None),
        Entry("sdxl", tiny.sdxl_pipeline, (4, 8, 12), 2, _UNGUIDED, _GUIDED, length=None),
        Entry("sd3", tiny.sd3_pipeline, (4, 8, 12), 4, _UNGUIDED, _GUIDED, length=24),
        Entry(
            "flux", tiny.flux_pipeline, (4, 8, 12), 4, {}, {"true_cfg_scale": 3.0, "negative_prompt": ""}, length=24
        ),
    )
}
ZOO = {
    entry.name: entry
    for entry in (
        Entry("flux2", flux2_pipeline, (4, 8, 12), 4, {}, _GUIDED),
        Entry("flux2-klein", flux2_klein_pipeline, (4, 8, 12), 4, _UNGUIDED, _GUIDED),
        Entry(
            "qwen",
            qwen_pipeline,
            (4, 8, 12),
            4,
            {"true_cfg_scale": 1.0},
            {"true_cfg_scale": 3.0, "negative_prompt": " "},
        ),
        Entry("zimage", zimage_pipeline, (4, 8, 12), 4, {"guidance_scale": 0.0}, _GUIDED),
        Entry("chroma", chroma_pipeline, (4, 8, 12), 4, _UNGUIDED, _GUIDED, length=24),
        Entry(
            "sana",
            sana_pipeline,
            (4, 8, 16),
            4,
            _UNGUIDED,
            _GUIDED,
            size=(32, 64),
            extra=_BINNED,
        ),
        Entry(
            "pixart-alpha",
            pixart_alpha_pipeline,
            (4, 8, 12),
            4,
            _UNGUIDED,
            _GUIDED,
            length=24,
            extra=_BINNED,
        ),
        Entry(
            "pixart-sigma",
            pixart_sigma_pipeline,
            (4, 8, 12),
            4,
            _UNGUIDED,
            _GUIDED,
            length=24,
            extra=_BINNED,
        ),
    )
}
