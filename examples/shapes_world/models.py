"""The small models of the shapes world: real diffusers and transformers classes, sized for a laptop."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from shapes_world import tokenizer_files
from shapes_world.tokenizer_files import END, START
from shapes_world.world import vocabulary

MAX_WORDS = 15  # of a sentence, with the tokens that begin and end it
LATENT_CHANNELS = 8
LATENT_SIZE = 8
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"


def vae() -> AutoencoderKL:
    """An autoencoder of 32 x 32 pixels and 8 x 8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the words of the world, one token each, and spells others by letters."""
    return tokenizer_files.clip_tokenizer(*_byte_pairs(vocabulary()), MAX_WORDS)


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that knows the words of the world, one token each, and spells others by letters."""
    return tokenizer_files.t5_tokenizer(_pieces(vocabulary()), MAX_WORDS)


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: str | Path) -> None:
    """Saves a pipeline with tokenizers that transformers 4 reads as well: transformers 5 writes others.

    Args:
        pipe: A pipeline of `sd3_pipeline`.
        folder: The folder.
    """
    folder = Path(folder)
    pipe.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer_files.write_clip_tokenizer(folder / name, *_byte_pairs(vocabulary()), MAX_WORDS)
    tokenizer_files.write_t5_tokenizer(folder / "tokenizer_3", _pieces(vocabulary()), MAX_WORDS)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def clip_config(words: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """The settings of a CLIP text encoder; Stable Diffusion 3 reads its last layer but one."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_WORDS,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def t5_encoder(words: T5TokenizerFast, width: int) -> T5EncoderModel:
    """A T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=width,
            d_kv=32,
            d_ff=4 * width,
            num_layers=2,
            num_heads=width // 32,
            dropout_rate=0.0,
        )
    )


def sd3_pipeline(autoencoder: AutoencoderKL, width: int = 128, layers: int = 6) -> StableDiffusion3Pipeline:
    """An untrained Stable Diffusion 3 pipeline."""
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        caption_projection_dim=width,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=CLIPTextModelWithProjection(clip_config(clip_words, width // 2)),
        tokenizer=clip_words,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip_words, width // 2)),
        tokenizer_2=clip_words,
        text_encoder_3=t5_encoder(t5_words, width),
        tokenizer_3=t5_words,
    )


def sd_pipeline(autoencoder: AutoencoderKL, width: int = 64) -> StableDiffusionPipeline:
    """An untrained Stable Diffusion pipeline with the noise schedule of version 1."""
    words = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=2 * width,
        attention_head_dim=4,  # heads, in spite of its name
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=autoencoder,
        text_encoder=CLIPTextModel(clip_config(words, 2 * width)),
        tokenizer=words,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def encode(
    pipe: StableDiffusion3Pipeline, captions: Sequence[str], t5_length: int = MAX_WORDS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the transformer reads of captions, (n, text, D) and (n, D), through which gradients flow."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(captions), None, None, do_classifier_free_guidance=False, max_sequence_length=t5_length
    )
    return embeds, pooled


def trained_parts(pipe: StableDiffusion3Pipeline | StableDiffusionPipeline) -> nn.ModuleList:
    """The modules that learn from captions; the autoencoder learns before them."""
    names = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
    return nn.ModuleList([pipe.components[name] for name in names if name in pipe.components])


def _pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Returns the pieces of a T5 tokenizer to which each word is one token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    return pieces + [("▁" + word, -1.0) for word in words if word != ","] + [(letter, -8.0) for letter in _LETTERS]


def _byte_pairs(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns a vocabulary and merges that make each word one token.

    A later merge has a lower rank and cannot disturb a word that earlier ones already join, so each word adds the
    merges that its pieces still need.
    """
    tokens = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            known = [(merges.index(pair), at) for at, pair in enumerate(pairs) if pair in merges]
            at = min(known)[1] if known else 0
            if not known:
                merges.append(pairs[at])
                tokens.append("".join(pairs[at]))
            pieces[at : at + 2] = ["".join(pairs[at])]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    return vocab, merges
