"""The shapes world: captions, images, the oracle that reads them, and the small models' words."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from transformers import AutoTokenizer

from shapes_world import models, oracle, train_base, world
from shapes_world.world import Ask, Thing, Want

FOLDER = Path(world.__file__).parent
# What the two kinds of tokenizers make of a caption and of a word that is not of the world.
TOKENS = (
    ("two red circles, a blue square", [180, 167, 142, 104, 77, 40, 97, 149, 181], [32, 24, 12, 73, 4, 10, 26, 1]),
    (
        "xylophone's",
        [180, 23, 24, 11, 14, 15, 7, 14, 13, 44, 38, 58, 181],
        [3, 59, 60, 47, 50, 51, 43, 50, 49, 40, 74, 54, 1],
    ),
)
RED_CIRCLE = Thing("red", "circle", 6.0, 6.0, 4.2)
BLUE_SQUARE = Thing("blue", "square", 26.0, 6.0, 4.2)


def drawn(count: int, seed: int = 0, *, free: bool = False) -> list[tuple[Ask, list[Thing], Image.Image]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ask = world.random_ask(rng)
        things = ask.scene(rng, free=free)
        found.append((ask, things, world.render(things, world.random_background(rng))))
    return found


@pytest.mark.parametrize("free", [False, True], ids=["grid", "free"])
def test_the_oracle_reads_every_clean_image(free):
    scenes = drawn(200, free=free)
    table = oracle.accuracy([image for *_, image in scenes], [ask for ask, *_ in scenes])
    assert table == dict.fromkeys((*world.SKILLS, "total"), 1.0)


def test_the_oracle_finds_things_where_they_are():
    for _, things, image in drawn(40, seed=1):
        reading = oracle.read(image)
        assert reading.unclear == 0 and min(reading.quality) > 0.8
        for thing in things:
            near = min(reading.things, key=lambda other: np.hypot(other.x - thing.x, other.y - thing.y))
            assert (near.color, near.shape) == (thing.color, thing.shape)
            assert np.hypot(near.x - thing.x, near.y - thing.y) < 1


def test_a_caption_that_differs_in_one_thing_is_false_by_the_oracle_where_it_is_false():
    checked = 0
    for ask, things, image in drawn(60, seed=2):
        for negatives in ask.negatives().values():
            for other in negatives:
                assert other.caption != ask.caption
                assert oracle.judge(image, other).correct == other.true_of(things)
                checked += not other.true_of(things)
    assert checked > 300


def test_what_makes_an_image_wrong():
    ask = Ask("position", (Want(1, "red", "circle"), Want(1, "blue", "square")), "left")
    assert ask.caption == "a red circle left of a blue square"
    assert ask.true_of([BLUE_SQUARE, RED_CIRCLE])
    wrong = {
        "missing": [RED_CIRCLE],
        "one too many": [RED_CIRCLE, BLUE_SQUARE, Thing("red", "cross", 16.0, 26.0, 4.2)],
        "swapped colours": [replace(RED_CIRCLE, color="blue"), replace(BLUE_SQUARE, color="red")],
        "swapped places": [replace(RED_CIRCLE, x=26.0), replace(BLUE_SQUARE, x=6.0)],
    }
    for reason, things in wrong.items():
        assert not oracle.judge(world.render(things), ask).correct, reason
    assert oracle.judge(world.render(wrong["one too many"]), ask).counted == 1
    assert oracle.judge(world.render(wrong["missing"]), ask).counted == -1


def test_a_patch_that_is_no_shape_counts_against_the_image():
    image = np.asarray(world.render([RED_CIRCLE])).copy()
    image[20:24, 4:30] = world.COLORS["green"]
    verdict = oracle.judge(Image.fromarray(image), Ask("colors", (Want(1, "red", "circle"),)))
    assert not verdict.correct and verdict.counted == 1 and verdict.quality < 0.6


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="reads 32 x 32 images, but this is 64 x 32"):
        oracle.read(Image.new("RGB", (64, 32)))


def test_negatives_swap_and_count_and_turn_round():
    ask = Ask("position", (Want(1, "red", "circle"), Want(1, "blue", "square")), "left")
    captions = {kind: {other.caption for other in asks} for kind, asks in ask.negatives().items()}
    assert "a red circle right of a blue square" in captions["relation"]
    assert "two red circles left of a blue square" in captions["number"]
    assert "a blue circle left of a red square" in captions["swap"]
    assert "a red triangle left of a blue square" in captions["attribute"]
    with pytest.raises(ValueError, match="skill must be one of single_object"):
        world.random_ask(np.random.default_rng(0), "juggling")


def test_every_word_is_one_token_and_every_caption_fits():
    clip, t5 = models.clip_tokenizer(), models.t5_tokenizer()
    for ask, *_ in drawn(300, seed=3):
        words = ask.caption.replace(",", " ,").split()
        assert len(clip(ask.caption).input_ids) == len(words) + 2 <= models.MAX_WORDS
        assert len(t5(ask.caption).input_ids) == len(words) + 1
    strange = clip("xylophone").input_ids
    assert len(strange) > 5 and clip.eos_token_id not in strange[1:-1]


def test_the_embedded_tokenizers_are_what_is_saved_and_give_the_same_numbers_with_each_release(tmp_path: Path):
    """transformers 4 and 5 read each other's files only if they have this form."""
    embedded = FOLDER / "sd3"
    models.save_pipeline(models.sd3_pipeline(models.vae(), width=64, layers=1), tmp_path)
    names = sorted(path.relative_to(embedded) for path in embedded.glob("tokenizer*/*"))
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.glob("tokenizer*/*"))
    index, saved = (json.loads((folder / "model_index.json").read_text()) for folder in (embedded, tmp_path))
    assert {name: kind for name, kind in index.items() if name[0] != "_"} == {
        name: kind for name, kind in saved.items() if name[0] != "_"
    }
    for folder in (embedded, tmp_path):
        clip, other, t5 = (AutoTokenizer.from_pretrained(folder / f"tokenizer{n}") for n in ("", "_2", "_3"))
        for text, clip_ids, t5_ids in TOKENS:
            assert clip(text).input_ids == other(text).input_ids == clip_ids
            assert t5(text).input_ids == t5_ids


def test_the_exact_phrasing_says_the_same_in_other_words():
    for ask, things, _ in drawn(200, seed=3):
        exact = ask.exactly()
        assert exact.caption.startswith(("there is ", "there are "))
        assert not ask.caption.startswith("there ")  # people ask in the everyday phrasings
        bare = replace(ask, phrasing=ask.phrasing % 2).caption
        assert exact.caption.split(" ", 2)[2] == bare
        assert exact.true_of(things) and exact.exactly() == exact


def test_a_caption_that_is_drawn_to_be_false_is_false_and_differs_in_one_thing():
    rng = np.random.default_rng(0)
    for ask, things, _ in drawn(200, seed=4):
        false = ask.false_of(things, rng)
        assert not false.true_of(things)
        assert any(false in others for others in ask.negatives().values())


def test_captions_of_the_second_stage_are_as_often_wrong_as_the_mixture_says_and_never_in_the_exact_phrasing():
    rng = np.random.default_rng(0)
    scenes = list(train_base.scenes(400, seed=4, shares=train_base.SKILL_SHARES))
    kinds = dict.fromkeys(("empty", "exact", "everyday, true", "everyday, wrong"), 0)
    for scene in scenes * 10:
        text = train_base.caption(scene, scenes[rng.integers(len(scenes))][0], rng, mixed=True)
        ask = scene[0]
        true = text in {replace(ask, phrasing=phrasing).caption for phrasing in range(6)}
        if text.startswith("there "):
            assert true
            kinds["exact"] += 1
        else:
            kinds["empty" if not text else "everyday, true" if true else "everyday, wrong"] += 1
    shares = {kind: count / (10 * len(scenes)) for kind, count in kinds.items()}
    said, mixture = 1 - train_base.NO_CAPTION, train_base.MIXTURE
    assert sum(mixture.values()) == pytest.approx(1)
    assert shares["empty"] == pytest.approx(train_base.NO_CAPTION, abs=0.02)
    assert shares["exact"] == pytest.approx(said * mixture["exact"], abs=0.03)
    # The caption of another image is that of this one by chance, rarely.
    assert shares["everyday, true"] == pytest.approx(said * mixture["true"], abs=0.03)
    assert shares["everyday, wrong"] == pytest.approx(said * (mixture["false"] + mixture["another"]), abs=0.03)


def test_captions_of_the_first_stage_are_true_in_all_phrasings():
    rng = np.random.default_rng(0)
    scenes = list(train_base.scenes(300, seed=4))
    texts = [train_base.caption(scene, scenes[0][0], rng, mixed=False) for scene in scenes]
    for (ask, _, _), text in zip(scenes, texts, strict=True):
        assert text in {"", *(replace(ask, phrasing=phrasing).caption for phrasing in range(6))}
    starts = [text.split(" ")[0] for text in texts]
    assert min(starts.count(word) for word in ("there", "drawing", "a")) > 30


def test_texts_that_are_encoded_once_are_those_that_the_pipeline_encodes():
    pipe = models.sd3_pipeline(models.vae(), width=64, layers=1)
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    texts = ["a circle", "", "two red squares", "a circle"]
    for _ in range(2):
        found = train_base.encoded_once(pipe, texts, known)
        for one, other in zip(found, models.encode(pipe, texts), strict=True):
            torch.testing.assert_close(one, other)
    assert sorted(known) == ["", "a circle", "two red squares"]


def test_the_share_of_the_phrasing_is_that_of_an_analysis_of_variance():
    captions = ["there is a circle", "there are two red squares", "a circle", "drawing of a circle", ""]
    embeds = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    share = train_base.phrasing_share(captions, embeds)
    read = embeds.detach().mean(1)
    within = read[:2].var(0, correction=0).sum() * 2 + read[2:].var(0, correction=0).sum() * 3
    assert share.item() == pytest.approx(1 - (within / (read.var(0, correction=0).sum() * 5)).item())
    share.backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0
    sides = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])[:, None, None].expand(5, 3, 4)
    assert train_base.phrasing_share(captions, sides).item() == pytest.approx(1)
    assert train_base.phrasing_share(["a circle"] * 5, embeds).item() == pytest.approx(0, abs=1e-6)


def test_a_base_is_trained_from_beginning_to_end(tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "sd3" / "vae", tmp_path / "vae")
    for name, value in {"SCENES": 40, "PROBES": 1, "PROBE_EVERY": 8}.items():
        monkeypatch.setattr(train_base, name, value)
    seen = []
    measured = train_base.flow_loss

    def watched(pipe, clean, embeds, *noisy):
        seen.append((clean, embeds.requires_grad))
        return measured(pipe, clean, embeds, *noisy)

    monkeypatch.setattr(train_base, "flow_loss", watched)
    monkeypatch.setattr(sys, "argv", ["train_base", "--out", str(tmp_path), "--steps", "8", "--batch-size", "8"])
    train_base.main()
    assert [learns for _, learns in seen] == [True] * 4 + [False] * 4  # the text encoders are frozen from then on
    latents = torch.load(tmp_path / "latents.pt")["latents"].float()
    assert latents.shape == (40, 8, 8, 8)
    shown = {int((latents == one).flatten(1).all(1).nonzero()[0]) for clean, _ in seen for one in clean}
    assert len(shown) > 20  # scenes of all kinds
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "sd3")
    assert pipe.components["vae"].config.scaling_factor == pytest.approx(0.667, abs=0.01)
    assert '"everyday": 0.' in (tmp_path / "log.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    script = "import sys; from shapes_world import train_base as t; t.SCENES, t.PHRASING_SHARE = 40, 1.0; t.main()"
    for processes in (1, 2):
        out = tmp_path / str(processes)
        shutil.copytree(FOLDER / "sd3" / "vae", out / "vae")
        command = ["-c", script, "--out", str(out), "--steps", "6", "--batch-size", "8", "--checkpoint-every", "6"]
        ranks = [
            subprocess.Popen(
                [sys.executable, *command],
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": "29519",
                },
            )
            for rank in range(processes)
        ]
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * processes
    one, two = (torch.load(tmp_path / name / "sd3.checkpoint.pt")["average"] for name in "12")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_skills_come_as_often_as_asked_for():
    said = [ask for ask, *_ in train_base.scenes(2000, seed=6, shares=train_base.SKILL_SHARES)]
    for skill, share in train_base.SKILL_SHARES.items():
        assert abs(np.mean([ask.skill == skill for ask in said]) - share) < 0.03


def test_images_show_what_may_be_said_of_their_scenes():
    drawn = list(train_base.scenes(20, seed=5))
    images = train_base.images(drawn).permute(0, 2, 3, 1).numpy()
    for (ask, _, _), pixels in zip(drawn, images, strict=True):
        assert oracle.judge(Image.fromarray(pixels), ask).correct


def test_samples_of_the_autoencoders_posterior_are_images_too():
    """Trainers draw latents from the posterior; one that is wide is noise, which no caption explains."""
    vae = AutoencoderKL.from_pretrained(FOLDER / "sd3" / "vae")
    scenes = drawn(120, seed=8)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for *_, image in scenes])).permute(0, 3, 1, 2)
    with torch.no_grad():
        posterior = vae.encode(train_base.as_input(pixels)).latent_dist
        decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(0))).sample
    assert posterior.std.mean() < 0.05 * posterior.mean.std()
    shown = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    right = [oracle.judge(Image.fromarray(one), ask).correct for one, (ask, *_) in zip(shown, scenes, strict=True)]
    assert np.mean(right) > 0.95


def test_narrowing_a_posterior_leaves_its_mode_alone():
    vae = models.vae()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = vae.encode(pixels).latent_dist
    train_base.narrow(vae)
    after = vae.encode(pixels).latent_dist
    assert torch.equal(before.mean, after.mean)
    torch.testing.assert_close(after.std, before.std * train_base.NARROWER)
