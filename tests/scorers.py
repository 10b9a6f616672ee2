"""Small random models of the real transformers classes for the metrics, saved as folders that metrics load."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import tiny

SIDE, WIDTH, PATCH = 30, 32, 10
_WORDS = "USER ASSISTANT Does this figure show Please answer yes or no Yes a the red blue cat dog two and of"
_CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    " ASSISTANT:{% endfor %}"
)


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def _processor(**options: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **options)


def clip(folder: Path, *, act: str = "quick_gelu", text_hidden: int = WIDTH) -> Path:
    """Saves a CLIP model with tokenizer and image processor."""
    text = tiny.clip_text_encoder().config.to_dict() | {
        "hidden_act": act,
        "num_attention_heads": 4,
        "intermediate_size": text_hidden,
    }
    vision = _vision() | {"hidden_act": act}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    for parameter in model.parameters():  # far from the small initial values, so that scores differ
        torch.nn.init.normal_(parameter, std=0.3)
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(folder)
    tiny.clip_tokenizer().save_pretrained(folder)
    _processor().save_pretrained(folder)
    return folder


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", '"', "?", ".", ":", *_WORDS.split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return wrapped


def llava(folder: Path) -> Path:
    """Saves a LLaVA model with its processor."""
    tokenizer = words_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()), text_config=text, image_token_id=image_token, image_seq_length=9
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    ).save_pretrained(folder)
    return folder
