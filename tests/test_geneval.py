"""GenEval's rules, the detectors, and both together on small random models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers import (
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)

import scorers
import tiny
from diffusers_softrepa.compat import pil_processor, pooled
from diffusers_softrepa.evaluation import BoxDetector, Detection, Detector, GenEval, Mask2FormerDetector, Prompt
from diffusers_softrepa.evaluation.metrics.detectors import instances
from diffusers_softrepa.evaluation.metrics.geneval import COLORS, cut_out, is_correct, relations, surest

CPU = torch.device("cpu")


def thing(label: str, score: float = 0.95, box: Any = (0, 0, 10, 10), mask: Any = None) -> Detection:
    return Detection(label, score, box, mask)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 10, 10), (100, 0, 110, 10), {"left of"}),
        ((100, 0, 110, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (100, 100, 110, 110), {"left of", "above"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (1.9, 0, 11.9, 10), set()),  # within a tenth of the summed widths
        ((0, 0, 10, 10), (3, 0, 13, 10), set()),  # beyond it, but by a third of the offset
        ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),  # by more than half
        ((0, 0, 10, 10), (100, 50, 110, 60), {"left of"}),  # too little of it is upwards
    ],
)
def test_relations_are_those_of_the_published_rule(one: Any, other: Any, expected: set[str]):
    assert relations(one, other) == expected


@pytest.mark.parametrize("seed", range(20))
def test_relations_equal_the_formula_in_vectors(seed: int):
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(0, 60, (2, 2, 2)), axis=1)  # (box, corner, axis)
    centres, sizes = boxes.mean(1), boxes[:, 1] - boxes[:, 0]
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - 0.1 * sizes.sum(0), 0) * np.sign(offset) / np.linalg.norm(offset)
    expected = {
        name
        for name, value in zip(
            ("left of", "right of", "above", "below"), (-beyond[0], beyond[0], -beyond[1], beyond[1]), strict=True
        )
        if value > 0.5
    }
    one, other = (tuple(box.reshape(-1).tolist()) for box in boxes)
    assert relations(one, other) == expected


def judged(task: dict[str, Any], found: list[Detection], colors: dict[int, str] | None = None) -> bool:
    """Returns the verdict on detections whose colours are told by their score in percent."""
    return is_correct(
        task, surest(found, 0.3), lambda objects, _: [(colors or {})[int(100 * o.score)] for o in objects]
    )


TWO_CLOCKS = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
DOG_RIGHT_OF_CAT = {
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
}


def test_objects_are_counted_exactly_where_more_are_excluded():
    for number, expected in ((1, False), (2, True), (3, False)):
        assert judged(TWO_CLOCKS, [thing("clock")] * number) is expected
    assert judged({"include": TWO_CLOCKS["include"]}, [thing("clock")] * 3)
    assert not judged(TWO_CLOCKS, [thing("clock"), thing("cat")])


def test_a_position_is_that_of_the_surest_objects():
    left, right = thing("cat", 0.9, (0, 0, 10, 10)), thing("dog", 0.9, (50, 0, 60, 10))
    assert judged(DOG_RIGHT_OF_CAT, [left, right])
    assert not judged(DOG_RIGHT_OF_CAT, [left, right, thing("dog", 0.95, (-50, 0, -40, 10))])
    assert judged(DOG_RIGHT_OF_CAT, [left, right, thing("dog", 0.85, (-50, 0, -40, 10))])
    assert not judged(DOG_RIGHT_OF_CAT, [right])


def test_colors_are_those_of_the_surest_objects():
    task = {"include": [{"class": "cup", "count": 1, "color": "red"}]}
    found = [thing("cup", 0.80), thing("cup", 0.90)]
    assert judged(task, found, {90: "red", 80: "blue"})
    assert not judged(task, found, {90: "blue", 80: "red"})


def test_only_the_surest_sixteen_above_the_threshold_are_kept():
    found = [thing("cup", score) for score in np.linspace(0.2, 0.9, 30)] + [thing("dog", 0.3)]
    kept = surest(found, 0.3)
    assert set(kept) == {"cup"} and len(kept["cup"]) == 16
    scores = [one.score for one in kept["cup"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == 0.9


def test_an_object_is_cut_out_before_grey():
    image = Image.new("RGB", (20, 20), "red")
    mask = np.zeros((20, 20), dtype=bool)
    mask[:10] = True
    crop = cut_out(image, thing("cup", box=(5, 5, 15, 15), mask=mask))
    assert crop.size == (10, 10)
    assert (crop.getpixel((0, 0)), crop.getpixel((0, 9))) == ((255, 0, 0), (0x99, 0x99, 0x99))
    assert cut_out(image, thing("cup", box=(5, 5, 15, 15))).getpixel((0, 9)) == (255, 0, 0)


class Planted(Detector):
    """Says what it is told to."""

    def __init__(self, found: list[Detection]) -> None:
        self.found = found

    def setup(self, device: torch.device) -> None:
        self.is_set_up = True

    @property
    def labels(self) -> set[str]:
        return {"cup", "clock", "cat", "dog"}

    def detect(self, image: Image.Image) -> list[Detection]:
        return self.found


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return scorers.clip(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def test_a_color_is_the_nearest_mean_of_the_templates(clip: Path):
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 19, 39), fill="purple")
    objects = [thing("cup", 0.9, (0, 0, 20, 40)), thing("cup", 0.8, (10, 0, 40, 40))]
    metric = GenEval(Planted(objects), str(clip))
    metric.setup(CPU)
    model, tokenizer = CLIPModel.from_pretrained(clip), tiny.clip_tokenizer()

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm(dim=-1, keepdim=True)

    def read(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"][: tiny.MAX_LENGTH]])
        ids[0, -1] = model.config.text_config.eos_token_id
        return unit(pooled(model.get_text_features(ids)))[0]

    expected = []
    for one in objects:
        pixels = scorers._processor()(image.crop(one.box), return_tensors="pt")["pixel_values"]
        seen = unit(pooled(model.get_image_features(pixels)))[0]
        near = []
        for color in COLORS:
            texts = f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"
            near.append(unit(sum(map(read, texts)) / 3) @ seen)
        expected.append(COLORS[int(torch.stack(near).argmax())])
    assert metric.colors(image, objects, "cup") == expected


def test_scores_are_one_or_zero_and_counting_needs_surer_objects(clip: Path):
    metric = GenEval(Planted([thing("clock", 0.95), thing("clock", 0.8)]), str(clip))
    metric.setup(CPU)
    image = Image.new("RGB", (20, 20))
    task = {"include": TWO_CLOCKS["include"]}
    prompts = [Prompt("0", "two clocks", metadata=task), Prompt("1", "", metadata={**task, "tag": "counting"})]
    assert metric.score([image, image], prompts).tolist() == [1.0, 0.0]


def test_other_prompts_and_unknown_classes_are_refused(clip: Path):
    metric = GenEval(Planted([]), str(clip))
    metric.setup(CPU)
    with pytest.raises(ValueError, match="prompt '7' has no 'include'"):
        metric.score([Image.new("RGB", (8, 8))], [Prompt("7", "a cat")])
    task = {"include": [{"class": "unicorn", "count": 1}]}
    with pytest.raises(ValueError, match="the detector does not know unicorn, which prompt '7' asks for"):
        metric.score([Image.new("RGB", (8, 8))], [Prompt("7", "a unicorn", metadata=task)])


# Detectors.


def test_instances_are_scored_by_class_and_mask():
    classes, masks = torch.randn(3, 5), torch.randn(3, 6, 8)
    masks[2] = -1  # nothing of this query is to be seen
    found = instances(classes, masks, {0: "a", 1: "b", 2: "c", 3: "d"})
    assert len(found) == 8
    for query in range(2):
        inside = masks[query] > 0
        sure = torch.sigmoid(masks[query])[inside].mean() * classes[query].softmax(0)[1]
        (same,) = (one for one in found if abs(one.score - sure.item()) < 1e-6)
        assert same.label == "b" and (same.mask == inside.numpy()).all()
        rows, columns = np.nonzero(same.mask)
        assert same.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


LABELS = {0: "person", 1: "mouse", 2: "tvmonitor"}


def test_mask2former_detects_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    with monkeypatch.context() as patch:  # its loss asks for scipy, which it only needs in training
        patch.setattr("transformers.models.mask2former.modeling_mask2former.requires_backends", lambda *_: None)
        model = Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    processor = pil_processor("Mask2FormerImageProcessor")(size={"shortest_edge": 48, "longest_edge": 64})
    processor.save_pretrained(tmp_path)
    detector = Mask2FormerDetector(str(tmp_path))
    detector.setup(CPU)
    assert detector.labels == {"person", "computer mouse", "tv"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    found = detector.detect(image)
    with torch.no_grad():
        output = model(**processor(images=[image], return_tensors="pt"))
    best = output.class_queries_logits[0].softmax(-1)[:, :-1].max().item()
    assert found and all(one.mask.shape == (48, 64) and 0 < one.score <= best for one in found)
    masks = nn.functional.interpolate(output.masks_queries_logits, size=(48, 64), mode="bilinear")[0]
    expected = instances(output.class_queries_logits[0], masks, {0: "person", 1: "computer mouse", 2: "tv"})
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-6)


def test_box_detectors_give_boxes_in_pixels(tmp_path: Path):
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=4,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    pil_processor("YolosImageProcessor")(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    detector = BoxDetector(str(tmp_path))
    detector.setup(CPU)
    found = detector.detect(Image.new("RGB", (80, 40)))
    assert len(found) == 4 and {one.label for one in found} <= detector.labels
    assert all(-80 <= one.box[0] <= one.box[2] <= 160 and one.mask is None for one in found)


def test_a_detector_without_a_model_says_so():
    for detector in (Mask2FormerDetector(), BoxDetector("a/b")):
        with pytest.raises(RuntimeError, match="call setup"):
            detector.detect(Image.new("RGB", (8, 8)))
