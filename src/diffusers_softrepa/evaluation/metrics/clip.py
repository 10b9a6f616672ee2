"""Metrics that compare image and prompt by CLIP embeddings: `CLIPScore`, `PickScore`, `HPSv2`.

With the normalized embeddings v of the image and t of the prompt:

    CLIPScore  2.5 max(<v, t>, 0), with "A photo depicts " before the prompt
    PickScore  s <v, t>, where s is the logit scale of the model
    HPSv2      <v, t>
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from ...compat import ClipProcessor, pooled
from ...hub import HubOptions, fetch
from ...quoting import one_line
from ..prompts import Prompt
from .loading import load
from .metric import ImageMetric
from .open_clip import to_transformers

CLIP_B = "openai/clip-vit-base-patch32"
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPS_REPO = "xswu/HPSv2"

HPSVersion = Literal["v2.0", "v2.1"]
HPS_FILES: dict[HPSVersion, str] = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@final
class ClipEncoder:
    """A CLIP model with its tokenizer and image processor.

    Args:
        model: A `CLIPModel` in eval mode.
        processing: Hub id or folder of the tokenizer and the image processor.
        needed_by: Name of the metric, for messages.
        square: Whether images are resized to a square; otherwise a square is cropped from the centre. Defaults to
            False.
    """

    def __init__(self, model: Any, processing: str, needed_by: str, *, square: bool = False) -> None:
        self.model = model
        side = model.config.vision_config.image_size
        stretch = {"size": {"height": side, "width": side}, "do_center_crop": False} if square else {}
        self.processor = load(ClipProcessor, processing, needed_by, **stretch)
        self.tokenizer = load(AutoTokenizer, processing, needed_by)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns the projected embeddings of images, (n, width)."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return pooled(self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns the projected embeddings of texts, (n, width); texts are truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(
            self.model.device
        )
        return pooled(self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Returns the cosine of each image and its text, (n,) float32."""
        features = normalize(self.images(images).float(), dim=-1) * normalize(self.texts(texts).float(), dim=-1)
        return features.sum(-1)


@final
class CLIPScore(ImageMetric[ClipEncoder]):
    """CLIPScore. With `weight=1, prefix=""` it is the plain cosine, which many tables call by the same name.

    Args:
        model: Hub id or folder of the CLIP model. Defaults to ViT-B/32.
        weight: Factor of the cosine. Defaults to 2.5.
        prefix: Text before each prompt. Defaults to "A photo depicts ".
        name: Name in tables. Defaults to `clip_score`.
    """

    reference = "Hessel et al. 2021, arXiv 2104.08718"

    def __init__(
        self,
        model: str = CLIP_B,
        *,
        weight: float = 2.5,
        prefix: str = "A photo depicts ",
        name: str = "clip_score",
    ) -> None:
        self.model, self.weight, self.prefix, self.name = model, weight, prefix, name

    def setup(self, device: torch.device) -> None:
        model = load(CLIPModel, self.model, "CLIPScore").eval().to(device)
        self.loaded = ClipEncoder(model, self.model, "CLIPScore")

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        cosines = self.loaded.cosines(images, [self.prefix + prompt.text for prompt in prompts])
        return self.weight * cosines.clamp(min=0)


@final
class PickScore(ImageMetric[ClipEncoder]):
    """PickScore, from a CLIP ViT-H/14 that was trained on human preferences.

    Args:
        model: Hub id or folder of the model. Defaults to the published one.
        processing: Hub id or folder of the tokenizer and the image processor. Defaults to LAION's CLIP ViT-H/14.
    """

    name = "pick_score"
    reference = "Kirstain et al. 2023, arXiv 2305.01569"

    def __init__(self, model: str = PICKSCORE, processing: str = CLIP_H) -> None:
        self.model, self.processing = model, processing

    def setup(self, device: torch.device) -> None:
        model = load(CLIPModel, self.model, "PickScore").eval().to(device)
        self.loaded = ClipEncoder(model, self.processing, "PickScore")

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        cosines = self.loaded.cosines(images, [prompt.text for prompt in prompts])
        return self.loaded.model.logit_scale.exp().float() * cosines


@final
class HPSv2(ImageMetric[ClipEncoder]):
    """Human Preference Score v2. Its open_clip checkpoint is converted for transformers when it is loaded.

    Args:
        version: `"v2.1"` or `"v2.0"`. Defaults to `"v2.1"`.
        weights: Path of the checkpoint. Defaults to the published file, which is downloaded from the Hub.
        processing: Hub id or folder of the configuration, the tokenizer and the image processor. Defaults to LAION's
            CLIP ViT-H/14.
    """

    reference = "Wu et al. 2023, arXiv 2306.09341"

    def __init__(
        self,
        version: HPSVersion = "v2.1",
        *,
        weights: str | os.PathLike[str] | None = None,
        processing: str = CLIP_H,
    ) -> None:
        if version not in HPS_FILES:
            raise ValueError(f"the version of HPSv2 must be one of {tuple(HPS_FILES)}, but is {version!r}")
        self.version, self.weights, self.processing = version, weights, processing
        self.name = f"hps_{version}"

    def setup(self, device: torch.device) -> None:
        config = load(CLIPConfig, self.processing, "HPSv2")
        model = CLIPModel(config)
        model.load_state_dict(to_transformers(self._read(), f"the HPS {self.version} checkpoint"))
        self.loaded = ClipEncoder(model.eval().to(device), self.processing, "HPSv2")

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        return self.loaded.cosines(images, [prompt.text for prompt in prompts])

    def _read(self) -> dict[str, Tensor]:
        file = HPS_FILES[self.version]
        if self.weights is None:
            try:
                path = fetch(HPS_REPO, file, HubOptions())
            except OSError as error:
                raise OSError(
                    f"HPSv2 needs {file} of {HPS_REPO}, which cannot be fetched ({error}); download it once with "
                    f"`hf download {HPS_REPO} {file}`, or give weights= the path of the file"
                ) from error
        else:
            path = Path(self.weights)
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise OSError(
                f"HPSv2 needs its checkpoint, but there is no file {path}; pass its path as weights"
            ) from error
        except Exception as error:  # a damaged stream makes the reader raise almost anything
            raise ValueError(
                f"{path} is not a checkpoint that holds only tensors ({one_line(error, 80)}); download it again"
            ) from error
        return content.get("state_dict", content)
