"""Small random models of the real transformers classes for the metrics, saved as folders that metrics load."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import tiny
from diffusers_softrepa.compat import ClipProcessor

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


def _processor(**options: Any) -> ClipProcessor:
    return ClipProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **options)


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
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()), text_config=text, image_token_index=image, image_seq_length=9
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


class OpenClipTower(nn.Module):
    """A transformer with open_clip's names."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock() for _ in range(layers))


class OpenClipBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = WIDTH
        hidden = 48
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClipVision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, patches = WIDTH, (SIDE // PATCH) ** 2
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenClipTower(2)
        self.proj = nn.Parameter(torch.randn(width, 16))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(image), 1, -1), patches], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP with open_clip's names, in its order of operations."""

    def __init__(self) -> None:
        super().__init__()
        vocabulary = 2 * len(tiny.LETTERS) + 2
        self.visual = OpenClipVision()
        self.transformer = OpenClipTower(2)
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(tiny.MAX_LENGTH, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("attn_mask", torch.full((tiny.MAX_LENGTH,) * 2, -math.inf).triu(1))

    def text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, self.attn_mask[: ids.shape[1], : ids.shape[1]])
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def hps(folder: Path) -> tuple[OpenClip, Path, Path]:
    """Saves a checkpoint of an open_clip model; returns the model, the file, and the folder of its processing."""
    model = OpenClip().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "hps.pt")
    processing = clip(folder / "hps-clip", act="gelu", text_hidden=48)
    (processing / "model.safetensors").unlink()  # only its configuration is needed
    return model, folder / "hps.pt", processing
