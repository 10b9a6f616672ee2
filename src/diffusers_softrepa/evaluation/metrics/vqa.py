"""`VQAScore`: the probability that a vision-language model answers Yes to 'Does this figure show "..."?'."""

from collections.abc import Sequence
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...compat import model_precision
from ..prompts import Prompt
from .loading import load
from .metric import ImageMetric

LLAVA = "llava-hf/llava-1.5-7b-hf"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"


@final
class VQAScore(ImageMetric[tuple[Any, Any]]):
    """VQAScore with a vision-language model of transformers: P(answer | image, question).

    The probability of an answer is the product of the probabilities of its tokens.

    Args:
        model: Hub id or folder of a chat model that takes images. Where torchvision is not installed, its processor
            must not need it. Defaults to LLaVA 1.5 7B, whose processor does not.
        question: The question, with `{}` in place of the prompt.
        answer: The answer whose probability is the score. Defaults to "Yes".
        dtype: Precision of the model. Defaults to bfloat16 on accelerators and to float32 on the CPU.
    """

    name = "vqa_score"
    reference = "Lin et al. 2024, arXiv 2404.01291"
    batch_size = 4

    def __init__(
        self, model: str = LLAVA, *, question: str = QUESTION, answer: str = ANSWER, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.question, self.answer, self.dtype = model, question, answer, dtype

    def setup(self, device: torch.device) -> None:
        dtype = self.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        processor = load(AutoProcessor, self.model, "VQAScore")
        if processor.chat_template is None:
            raise ValueError(f"VQAScore needs a chat model, but {self.model} has no chat template; use another model")
        processor.tokenizer.padding_side = "left"  # the answer must be at the end of every row
        model = load(AutoModelForImageTextToText, self.model, "VQAScore", **model_precision(dtype)).eval().to(device)
        self.loaded = processor, model

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        processor, model = self.loaded
        asked = [self._chat(processor, prompt.text) for prompt in prompts]
        answer = processor.tokenizer(self.answer, add_special_tokens=False)["input_ids"]
        inputs = processor(images=[[image] for image in images], text=asked, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        batch = len(images)
        tail = torch.tensor(answer, device=model.device).expand(batch, -1)  # (n, answer)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tail)], dim=1)
        logits = model(**inputs).logits[:, -len(answer) - 1 : -1].float()  # (n, answer, words)
        return logits.log_softmax(-1).gather(-1, tail[..., None]).sum((1, 2)).exp()

    def _chat(self, processor: Any, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.question.format(text)}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
