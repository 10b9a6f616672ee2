"""Edits in the shapes world: the measures see what was done and what was kept, and the command writes them down."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shapes_world import edits, models


def ideal(edit: edits.Edit, rng: np.random.Generator) -> Image.Image:
    """Draws what a perfect edit makes of an image."""
    things, wanted = list(edit.things), edit.target.wants[0]
    if edit.kind != "count":
        first = next(thing for thing in things if thing not in edit.stays)
        return edits.render([*edit.stays, replace(first, color=wanted.color, shape=wanted.shape)])
    if wanted.count < edit.source.wants[0].count:
        return edits.render(things[1:])
    while True:
        one = replace(things[0], **dict(zip("xy", rng.uniform(5, 27, 2), strict=True)))
        if all(np.hypot(one.x - t.x, one.y - t.y) > one.radius + t.radius + 1 for t in things):
            return edits.render([*things, one])


def test_a_perfect_edit_is_done_and_keeps_the_rest():
    drawn, rng = edits.draw_edits(8, seed=0), np.random.default_rng(1)
    table = edits.measure(drawn, [ideal(edit, rng) for edit in drawn])
    for row in table.values():
        assert row["done"] == row["kept"] == 1 and row["done_error"] == 0
        assert row["outside"] < 0.5


def test_an_image_left_alone_is_kept_and_not_done():
    drawn = edits.draw_edits(8, seed=0)
    for row in edits.measure(drawn, [edit.image for edit in drawn]).values():
        assert (row["done"], row["kept"], row["outside"]) == (0, 1, 0)


def test_the_gain_is_paired_edit_by_edit():
    drawn, rng = edits.draw_edits(8, seed=0), np.random.default_rng(1)
    good, left = [ideal(edit, rng) for edit in drawn], [edit.image for edit in drawn]
    half = [images[row % 2] for row, images in enumerate(zip(left, good, strict=True))]
    row = edits.measure(drawn, good, half)["all"]
    assert row["gain"] == 0.5 and row["gain_error"] == pytest.approx(0.5 / np.sqrt(len(drawn) - 1))
    assert edits.measure(drawn, half, half)["all"]["gain_error"] == 0  # the same edits fail in both


def test_an_empty_image_keeps_nothing():
    drawn = [edit for edit in edits.draw_edits(8, seed=0) if edit.stays]
    empty = edits.render([])
    assert not any(edit.kept(empty) for edit in drawn if edit.kind != "count" or len(edit.stays) > 1)


def test_captions_of_an_edit_differ_in_one_thing():
    for edit in edits.draw_edits(16, seed=2):
        assert edit.source.true_of(edit.things) and not edit.target.true_of(edit.things)
        before, after = edit.source.wants[0], edit.target.wants[0]
        changed = [name for name in ("count", "color", "shape") if getattr(before, name) != getattr(after, name)]
        assert changed == [{"color": "color", "object": "shape", "count": "count"}[edit.kind]]
        assert edit.source.wants[1:] == edit.target.wants[1:]


def test_the_command_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe = models.sd3_pipeline(models.vae(), width=64, layers=2)
    pipe.save_pretrained(tmp_path / "base")
    pipe.add_softrepa()
    for parameter in pipe.softrepa_parameters().values():
        torch.nn.init.normal_(parameter)
    pipe.save_softrepa(tmp_path / "adapter")
    argv = ["--pipeline", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--count", "2", "--steps", "2"]
    results = edits.main([*argv, "--strength", "0.5", "--adapter", str(tmp_path / "adapter")])
    assert list(results) == ["autoencoder", "base", "adapter"]
    assert list(results["base"]) == ["color", "object", "count", "all"]
    assert json.loads((tmp_path / "out" / "edits.json").read_text())["results"] == results
    table = (tmp_path / "out" / "edits.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + 3 * 4 and table in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "edits.png") as image:
        assert image.height > 6 * 96
