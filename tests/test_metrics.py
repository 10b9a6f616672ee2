"""Metrics give the numbers of their published formulas, computed here another way, and say what they are missing."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, CLIPModel, Dinov2Config, Dinov2Model, LlavaForConditionalGeneration

import scorers
import tiny
from diffusers_softrepa.compat import pil_processor
from diffusers_softrepa.evaluation import (
    CMMD,
    FDCLIP,
    IMAGE_METRICS,
    SET_METRICS,
    CLIPScore,
    FDDINOv2,
    HPSv2,
    PickScore,
    Prompt,
    VQAScore,
    load_prompts,
    make_metric,
)
from diffusers_softrepa.evaluation.metrics import as_metrics
from diffusers_softrepa.evaluation.metrics.distances import frechet_distance, maximum_mean_discrepancy
from diffusers_softrepa.evaluation.metrics.metric import FunctionMetric, named_scores
from diffusers_softrepa.evaluation.metrics.open_clip import to_transformers

CPU = torch.device("cpu")
PROMPTS = load_prompts(["a red cat", "two blue dogs and a cat", "a dog"])
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def make_images(count: int = 3, *, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


def pixels(image: Image.Image, mean: Tensor = MEAN, std: Tensor = STD, side: int = scorers.SIDE) -> Tensor:
    """Returns a square image as a CLIP model reads it, (1, 3, side, side)."""
    small = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return ((torch.from_numpy(small.copy()).float() / 255 - mean) / std).permute(2, 0, 1)[None]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum(-1, keepdim=True).sqrt()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return scorers.clip(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def cosines(folder: Path, images: list[Image.Image], texts: list[str]) -> Tensor:
    """Returns cosines, one image and one unpadded text at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder), tiny.clip_tokenizer()
    found = []
    for image, text in zip(images, texts, strict=True):
        seen = model.vision_model(pixels(image)).pooler_output @ model.visual_projection.weight.T
        ids = torch.tensor([tokenizer(text)["input_ids"][: tiny.MAX_LENGTH]])
        ids[0, -1] = model.config.text_config.eos_token_id
        read = model.text_model(ids).pooler_output @ model.text_projection.weight.T
        found.append((unit(seen) * unit(read)).sum())
    return torch.stack(found)


def scored(metric: Any, images: list[Image.Image], prompts: list[Prompt] = PROMPTS) -> Tensor:
    metric.setup(CPU)
    (values,) = named_scores(metric, images, prompts).values()
    metric.close()
    return values.float()


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_two_and_a_half_times_the_cosine_above_zero(clip: Path, tmp_path: Path, sign: int):
    model = CLIPModel.from_pretrained(clip)
    model.text_projection.weight.data *= sign
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    expected = cosines(tmp_path, make_images(), [f"A photo depicts {prompt.text}" for prompt in PROMPTS])
    assert expected.abs().min() > 0.01
    found = scored(CLIPScore(str(tmp_path)), make_images())
    torch.testing.assert_close(found, 2.5 * expected.clamp(min=0), atol=1e-5, rtol=0)


def test_without_weight_and_prefix_it_is_the_plain_cosine(clip: Path):
    expected = cosines(clip, make_images(), [prompt.text for prompt in PROMPTS])
    found = scored(CLIPScore(str(clip), weight=1.0, prefix="", name="clip"), make_images())
    torch.testing.assert_close(found, expected.clamp(min=0), atol=1e-5, rtol=0)


def test_pick_score_is_the_cosine_at_the_models_scale(clip: Path):
    images = make_images()
    expected = math.exp(1.5) * cosines(clip, images, [prompt.text for prompt in PROMPTS])
    assert expected.abs().min() > 0.01
    torch.testing.assert_close(scored(PickScore(str(clip), str(clip)), images), expected, atol=1e-5, rtol=0)


@pytest.fixture
def hps(tmp_path: Path) -> tuple[scorers.OpenClip, Path, Path]:
    """A model, its checkpoint, and the folder of its configuration and processors."""
    return scorers.hps(tmp_path)


@torch.no_grad()
def test_hps_of_an_open_clip_checkpoint_is_the_cosine_of_that_model(hps: Any):
    model, weights, processing = hps
    images, tokenizer = make_images(), tiny.clip_tokenizer()
    expected = [
        (
            unit(model.visual(pixels(image))) * unit(model.text(torch.tensor([tokenizer(prompt.text)["input_ids"]])))
        ).sum()
        for image, prompt in zip(images, PROMPTS[:1] + PROMPTS[2:] + PROMPTS[:1], strict=True)
    ]
    metric = HPSv2(weights=weights, processing=str(processing))
    found = scored(metric, images, PROMPTS[:1] + PROMPTS[2:] + PROMPTS[:1])
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_another_checkpoint_is_refused_by_name(hps: Any, tmp_path: Path):
    _, _, processing = hps
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must be an open_clip CLIP, but holds 'weight'"):
        HPSv2(weights=tmp_path / "other.pt", processing=str(processing)).setup(CPU)
    with pytest.raises(OSError, match=r"there is no file .*nowhere.pt; pass its path as weights"):
        HPSv2(weights=tmp_path / "nowhere.pt", processing=str(processing)).setup(CPU)
    (tmp_path / "pickle.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="is not a checkpoint that holds only tensors"):
        HPSv2(weights=tmp_path / "pickle.pt", processing=str(processing)).setup(CPU)
    with pytest.raises(ValueError, match="must be one of"):
        HPSv2("v3")  # type: ignore[arg-type]


def test_every_weight_of_an_open_clip_checkpoint_has_a_place(hps: Any):
    model, _, processing = hps
    from transformers import CLIPConfig

    target = CLIPModel(CLIPConfig.from_pretrained(processing))
    assert to_transformers(model.state_dict(), "it").keys() == target.state_dict().keys()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return scorers.llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("answer", ["Yes", "Yes no"])
@torch.no_grad()
def test_vqa_score_is_the_probability_of_the_answer(llava: Path, answer: str):
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    images, expected = make_images(), []
    for image, prompt in zip(images, PROMPTS, strict=True):
        text = f'USER: <image> Does this figure show "{prompt.text}"? Please answer yes or no. ASSISTANT:'
        probability = torch.ones(())
        for word in answer.split():
            inputs = processor(images=image, text=text, return_tensors="pt")
            token = processor.tokenizer.convert_tokens_to_ids(word)
            probability = probability * model(**inputs).logits[0, -1].softmax(-1)[token]
            text += f" {word}"
        expected.append(probability)
    torch.testing.assert_close(
        scored(VQAScore(str(llava), answer=answer), images), torch.stack(expected), atol=1e-6, rtol=1e-4
    )


def test_a_model_that_does_not_chat_is_refused(llava: Path, tmp_path: Path):
    processor = AutoProcessor.from_pretrained(llava)
    processor.save_pretrained(tmp_path)
    for template in tmp_path.glob("chat_template.*"):  # its ending depends on the release of transformers
        template.unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        VQAScore(str(tmp_path)).setup(CPU)


# Distances.


def test_the_frechet_distance_is_that_of_the_formula():
    one, other = torch.randn(50, 6).double(), (1 + 2 * torch.randn(40, 6) @ torch.randn(6, 6)).double()
    mean, cov = (one.mean(0), other.mean(0)), (torch.cov(one.T), torch.cov(other.T))
    values = torch.linalg.eigvals(cov[0] @ cov[1])  # of the product itself, which is not symmetric
    expected = (mean[0] - mean[1]).square().sum() + (cov[0] + cov[1]).trace() - 2 * values.sqrt().sum().real
    assert frechet_distance(one, other) == pytest.approx(expected.item(), abs=1e-9)
    assert frechet_distance(one.float(), one.float()) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(one[:1], other)


def test_fewer_images_than_features_have_a_frechet_distance():
    one, other = torch.randn(5, 20), torch.randn(4, 20)
    assert 0 < frechet_distance(one, other) < 1000
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-6)


def test_the_discrepancy_is_that_of_the_formula():
    one, other = torch.randn(7, 3).double(), 5 + torch.randn(4, 3).double()

    def kernel(a: Tensor, b: Tensor) -> float:
        values = [math.exp(-((x - y) ** 2).sum().item() / 200) for x in a for y in b]
        return sum(values) / len(values)

    expected = 1000 * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))
    assert maximum_mean_discrepancy(one, other) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_clip_distances_are_those_of_the_models_features(clip: Path):
    model = CLIPModel.from_pretrained(clip)
    images, references = make_images(5), make_images(6, seed=1)

    def features(of: list[Image.Image]) -> Tensor:
        seen = [model.vision_model(pixels(image)).pooler_output @ model.visual_projection.weight.T for image in of]
        return torch.cat(seen)

    for metric, expected in (
        (FDCLIP(references, str(clip)), frechet_distance(features(images), features(references))),
        (
            CMMD(references, str(clip)),
            maximum_mean_discrepancy(unit(features(images)), unit(features(references))),
        ),
    ):
        metric.setup(CPU)
        metric.batch_size = 4
        found = metric.distance(metric.features(images), metric.reference_features())
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_cmmd_stretches_images_and_fd_clip_cuts_their_middle(clip: Path):
    wide = make_images(1)[0].resize((80, 40))
    middle = wide.crop((20, 0, 60, 40))
    for cls, seen in ((CMMD, wide.resize((40, 40), Image.Resampling.BICUBIC)), (FDCLIP, middle)):
        metric = cls(make_images(), str(clip))
        metric.setup(CPU)
        one, other, wrong = metric.features([wide, seen, middle if cls is CMMD else wide.resize((40, 40))])
        assert (one - other).norm() < (one - wrong).norm() / 3


@torch.no_grad()
def test_fd_dinov2_reads_the_class_token_of_a_stretched_image(tmp_path: Path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pil_processor("BitImageProcessor")(size={"shortest_edge": 32}, image_mean=mean, image_std=std).save_pretrained(
        tmp_path
    )
    images, references = make_images(4), make_images(3, seed=2)
    metric = FDDINOv2(references, str(tmp_path), side=28)
    metric.setup(CPU)
    read = [pixels(image, torch.tensor(mean), torch.tensor(std), 28) for image in images]
    expected = torch.cat([model(one).last_hidden_state[:, 0] for one in read])
    torch.testing.assert_close(metric.features(images), expected, atol=1e-5, rtol=1e-5)
    assert metric.distance(metric.features(images), metric.reference_features()) > 0


def test_reference_images_are_a_folder_or_a_list(tmp_path: Path):
    for number, image in enumerate(make_images()):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert len(FDCLIP(tmp_path).references) == 3
    with pytest.raises(OSError, match="there is no folder"):
        FDCLIP(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 2 reference images, but there are 1"):
        FDCLIP(make_images(1))


# What is missing is one sentence.


@pytest.mark.parametrize("name", list(IMAGE_METRICS))
def test_missing_weights_are_named_with_how_to_get_them(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match=r"needs .* cannot be loaded .*`hf download [\w-]+/[\w.-]+` while online"
    ) as caught:
        make_metric(name).setup(CPU)
    assert "\n" not in str(caught.value)


def test_missing_hps_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"`hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"):
        HPSv2(processing=str(clip)).setup(CPU)


# Metrics by name and of one's own.


def test_every_metric_names_itself_its_direction_and_its_paper():
    made = [make_metric(name, make_images()) for name in [*IMAGE_METRICS, *SET_METRICS]]
    assert [metric.name for metric in made] == [*IMAGE_METRICS, *SET_METRICS]
    assert all("arXiv" in metric.reference for metric in made)
    lower = [metric.name for metric in made if not metric.higher_is_better]
    assert lower == list(SET_METRICS)


def test_unknown_and_incomplete_names_are_refused():
    with pytest.raises(ValueError, match="no metric is named 'fid'; the metrics are clip_score, "):
        make_metric("fid")
    with pytest.raises(ValueError, match="cmmd compares with reference images; pass a folder of them as references"):
        make_metric("cmmd")
    with pytest.raises(ValueError, match="the names of metrics must differ"):
        as_metrics(["clip_score", "clip_score"])
    with pytest.raises(TypeError, match="a metric is a Metric, a name or a function"):
        as_metrics([3])


def test_a_function_is_a_metric_with_parts_if_it_likes():
    def oracle(images: Any, prompts: Any) -> dict[str, Any]:
        return {"correct": [len(prompt.text) > 5 for prompt in prompts], "quality": torch.linspace(0, 1, len(images))}

    (metric,) = as_metrics([oracle])
    found = named_scores(metric, make_images(), PROMPTS)
    assert {name: value.tolist() for name, value in found.items()} == {
        "oracle/correct": [1.0, 1.0, 0.0],
        "oracle/quality": [0.0, 0.5, 1.0],
    }
    with pytest.raises(
        ValueError, match=r"few must be one number for each of 3 images, but is torch.* of shape \(2,\)"
    ):
        named_scores(FunctionMetric(lambda *_: [1, 2], "few"), make_images(), PROMPTS)
