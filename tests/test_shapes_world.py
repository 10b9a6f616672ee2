"""The shapes world: captions, pictures, the oracle that reads them, and the small models' words."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes_world"))

import models
import oracle
import train_base
import world
from world import Ask, Thing, Want

FOLDER = Path(world.__file__).parent
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
def test_the_oracle_reads_every_clean_picture(free):
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


def test_what_makes_a_picture_wrong():
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


def test_a_patch_that_is_no_shape_counts_against_the_picture():
    picture = np.asarray(world.render([RED_CIRCLE])).copy()
    picture[20:24, 4:30] = world.COLORS["green"]
    verdict = oracle.judge(Image.fromarray(picture), Ask("colors", (Want(1, "red", "circle"),)))
    assert not verdict.correct and verdict.counted == 1 and verdict.quality < 0.6


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="reads 32 x 32 pictures, but this is 64 x 32"):
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


def test_there_is_room_for_the_tag_and_no_word_of_captions_is_in_it():
    clip, t5 = models.clip_tokenizer(), models.t5_tokenizer()
    assert world.TAG not in world.vocabulary()
    for ask, *_ in drawn(300, seed=3):
        tagged = ask.tagged()
        assert tagged.caption == f"{replace(ask, phrasing=ask.phrasing % 2).caption} {world.TAG}"
        assert max(len(clip(tagged.caption).input_ids), len(t5(tagged.caption).input_ids)) <= models.MAX_WORDS
        assert ask.tagged("") == ask


@pytest.mark.parametrize("tagged, left_out", [(0.0, 0.0), (1 / 3, 0.5), (0.0, 1 / 3)])
def test_captions_of_the_base_leave_out_as_often_as_told_unless_they_are_tagged(tagged, left_out):
    rng = np.random.default_rng(0)
    asks = [ask for ask, *_ in train_base.scenes(400, seed=4, shares=train_base.SKILL_SHARES)]
    found = [(ask, *train_base.caption(ask, rng, tagged, left_out)) for ask in asks for _ in range(10)]
    for ask, text, _ in found:
        said = [replace(ask, phrasing=i) for i in range(6)]
        assert text in {"", *(some.caption for some in said), *(some.tagged().caption for some in said)}
    ends = np.array([text.endswith(world.TAG) for _, text, _ in found])
    empty, more = np.array([not text for _, text, _ in found]), np.array([more for *_, more in found])
    assert abs(empty.mean() - train_base.NO_CAPTION) < 0.02
    assert abs(ends[~empty].mean() - tagged) < 0.03
    assert not more[ends].any()
    assert abs(more[~ends & ~empty].mean() - left_out) < 0.03
    assert abs(more[empty].mean() - left_out * (1 - tagged)) < 0.08  # of pictures as a whole


def test_a_picture_that_shows_one_thing_more_is_not_what_was_said():
    rng = np.random.default_rng(0)
    for ask, things, shade in train_base.scenes(60, seed=7):
        more = world.with_another(things, rng)
        assert more[:-1] == things and not ask.true_of(more)
        verdict = oracle.judge(world.render(more, shade), ask)
        assert not verdict.correct and verdict.counted == 1


def test_text_encoders_are_left_out_one_by_one():
    embeds, pooled = torch.ones(4, models.MAX_WORDS + 7, 8), torch.ones(4, 8)
    dropped = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    embeds, pooled = train_base.without(embeds, pooled, dropped)
    first, second, t5 = (
        embeds[:, : models.MAX_WORDS, :4],
        embeds[:, : models.MAX_WORDS, 4:],
        embeds[:, models.MAX_WORDS :],
    )
    for part, column in ((first, 0), (second, 1), (t5, 2), (pooled[:, :4], 0), (pooled[:, 4:], 1)):
        assert torch.equal(part.amax(tuple(range(1, part.ndim))), (~dropped[:, column]).float())
        assert torch.equal(part.amin(tuple(range(1, part.ndim))), (~dropped[:, column]).float())


@pytest.mark.parametrize("part, loss", [("sd3", "flow_loss"), ("sd", "noise_loss")])
def test_a_base_is_trained_from_beginning_to_end(tmp_path, monkeypatch, part, loss):
    shutil.copytree(FOLDER / "sd3" / "vae", tmp_path / "vae")
    monkeypatch.setattr(train_base, "SCENES", 40)
    seen = []
    measured = getattr(train_base, loss)

    def watched(pipe, clean, captions, rng, dropped):
        seen.append((clean, pipe.text_encoder.get_input_embeddings().weight.requires_grad, dropped))
        return measured(pipe, clean, captions, rng, dropped)

    monkeypatch.setattr(train_base, loss, watched)
    monkeypatch.setattr(
        sys, "argv", ["train_base.py", part, "--out", str(tmp_path), "--steps", "4", "--batch-size", "8"]
    )
    train_base.main()
    assert [(learns, dropped) for _, learns, dropped in seen] == [(True, 0.0)] * 3 + [(False, train_base.DROPPED)]
    latents = torch.load(tmp_path / "latents.pt")["latents"].float()
    assert latents.shape == (2, 40, 8, 8, 8)
    early = {int((latents[0] == one).flatten(1).all(1).nonzero()[0]) for clean, *_ in seen[:3] for one in clean}
    assert len(early) > 10  # scenes of all kinds, and each as it was said
    pipe = DiffusionPipeline.from_pretrained(tmp_path / part)
    assert pipe.components["vae"].config.scaling_factor == pytest.approx(0.667, abs=0.01)


def test_skills_come_as_often_as_asked_for():
    said = [ask for ask, *_ in train_base.scenes(2000, seed=6, shares=train_base.SKILL_SHARES)]
    for skill, share in train_base.SKILL_SHARES.items():
        assert abs(np.mean([ask.skill == skill for ask in said]) - share) < 0.03


def test_pictures_show_what_may_be_said_of_their_scenes():
    drawn = list(train_base.scenes(20, seed=5))
    images = train_base.pictures(drawn).permute(0, 2, 3, 1).numpy()
    for (ask, _, _), pixels in zip(drawn, images, strict=True):
        assert oracle.judge(Image.fromarray(pixels), ask).correct


def test_samples_of_the_autoencoders_posterior_are_pictures_too():
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
