"""Edits images of the shapes world with FlowEdit, without and with an adapter, and lets the oracle judge them.

    python -m shapes_world.edits --pipeline outputs/base/sd3 --adapter ADAPTER --out outputs/edits

Three kinds of edit: another colour, another shape, one thing more or less. Of every edited image it is measured

    done     the oracle finds exactly what the target caption says
    kept     every thing that neither caption changes is still there, of its colour and shape and in its place
    outside  mean change of the pixels away from the changed things, in grey levels of 255

The row `autoencoder` is the image encoded and decoded: what `outside` can be at best. The folder gets `edits.md`,
`edits.json` and `edits.png`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw

from diffusers_softrepa import flow_edit
from shapes_world.drawing import mean_and_error, right
from shapes_world.oracle import read
from shapes_world.world import COLORS, SHAPES, SIZE, Ask, Thing, random_ask, render

KINDS = ("color", "object", "count")
NEAR = 4.0  # pixels; a thing nearer than this to where it was has stayed
SETTINGS = {  # of FlowEdit in this world
    "num_inference_steps": 28,
    "strength": 0.8,
    "source_guidance_scale": 1.5,
    "target_guidance_scale": 5.5,
}
MARGIN = 1.5  # pixels around a changed thing that belong to it
_SKILLS = {"color": ("colors", "color_attr"), "object": ("colors", "color_attr"), "count": ("counting",)}
_SCALE, _LABEL = 3, 12  # of images, and height of a line of text


@dataclass(frozen=True)
class Edit:
    """One edit to make.

    Attributes:
        kind: One of `KINDS`.
        source: What the image shows.
        target: What it shall show.
        things: Of the image.
        stays: Those of them that the edit leaves alone; of counts, all that may stay.
        image: The image.
    """

    kind: str
    source: Ask
    target: Ask
    things: tuple[Thing, ...]
    stays: tuple[Thing, ...]
    image: Image.Image

    def kept(self, edited: Image.Image) -> bool:
        """Whether what the edit leaves alone is still there, but for the one thing that a lower count takes."""
        seen = read(edited).things
        there = sum(any(_same(thing, other) for other in seen) for thing in self.stays)
        taken = self.kind == "count" and self.target.wants[0].count < self.source.wants[0].count
        return there >= len(self.stays) - taken

    def outside(self, edited: Image.Image) -> float:
        """Mean absolute change away from things that are in one of the images only, 0..255."""
        seen = read(edited).things
        changed = [thing for thing in self.things if not any(_same(thing, other) for other in seen)]
        changed += [thing for thing in seen if not any(_same(thing, other) for other in self.things)]
        changed += [thing for thing in self.things if thing not in self.stays]
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        away = np.ones((SIZE, SIZE), dtype=bool)
        for thing in changed:
            away &= np.hypot(x - thing.x, y - thing.y) > thing.radius + MARGIN
        difference = np.abs(np.asarray(edited, dtype=float) - np.asarray(self.image, dtype=float))
        return float(difference[away].mean()) if away.any() else float("nan")


def _same(thing: Thing, other: Thing) -> bool:
    alike = (thing.color, thing.shape) == (other.color, other.shape)
    return alike and float(np.hypot(thing.x - other.x, thing.y - other.y)) < NEAR


def draw_edit(kind: str, rng: np.random.Generator) -> Edit:
    """Draws a scene and an edit of it."""
    skills = _SKILLS[kind]
    while True:
        source = replace(random_ask(rng, skills[rng.integers(len(skills))]), phrasing=0)
        first = source.wants[0]
        if kind == "color":
            taken = {want.color for want in source.wants}
            changed = replace(first, color=str(rng.choice([color for color in COLORS if color not in taken])))
        elif kind == "object":
            taken = {want.shape for want in source.wants}
            changed = replace(first, shape=str(rng.choice([shape for shape in SHAPES if shape not in taken])))
        else:
            changed = replace(first, count=first.count + int(rng.choice([-1, 1])))
        if 1 <= changed.count <= 4 and first.color is not None:
            break
    things = tuple(source.scene(rng))
    stays = things if kind == "count" else tuple(thing for thing in things if not first.fits(thing))
    target = replace(source, wants=(changed, *source.wants[1:]))
    return Edit(kind, source, target, things, stays, render(things))


def draw_edits(count: int, seed: int) -> list[Edit]:
    """Draws `count` edits of every kind."""
    rng = np.random.default_rng(seed)
    return [draw_edit(kind, rng) for kind in KINDS for _ in range(count)]


def run(
    pipe: StableDiffusion3Pipeline, edits: Sequence[Edit], *, batch: int, adapter: bool, **settings: float
) -> list[Image.Image]:
    """Returns the edited images. The noise of an edit is the same in every setting."""
    images: list[Image.Image] = []
    for start in range(0, len(edits), batch):
        some = edits[start : start + batch]
        images += flow_edit(
            pipe,
            [edit.image for edit in some],
            [edit.source.caption for edit in some],
            [edit.target.caption for edit in some],
            adapter_scope="both" if adapter else "none",
            generator=start,
            **settings,
        )
    return images


def autoencoded(pipe: StableDiffusion3Pipeline, edits: Sequence[Edit]) -> list[Image.Image]:
    """Returns the images encoded and decoded: an edit from a caption to itself."""
    same = {"num_inference_steps": 1, "strength": 1.0, "source_guidance_scale": 1.0, "target_guidance_scale": 1.0}
    return flow_edit(pipe, [edit.image for edit in edits], "", "", generator=0, **same)


def measure(
    edits: Sequence[Edit], images: Sequence[Image.Image], before: Sequence[Image.Image] | None = None
) -> dict[str, dict[str, float]]:
    """Returns by kind of edit, and for `all`, the means of the measures with the standard error of `done`.

    Args:
        edits: What was to be edited.
        images: What came out, an image for each edit.
        before: The same of another setting; `gain` is then by how much `done` is higher, with its paired error.
    """
    done = right(images, [edit.target for edit in edits])
    difference = None if before is None else done - right(before, [edit.target for edit in edits])
    kept = np.array([edit.kept(image) for edit, image in zip(edits, images, strict=True)])
    outside = np.array([edit.outside(image) for edit, image in zip(edits, images, strict=True)])
    table = {}
    for kind in (*KINDS, "all"):
        here = np.array([kind in (edit.kind, "all") for edit in edits])
        table[kind] = dict(zip(("done", "done_error"), mean_and_error(done[here]), strict=True))
        table[kind] |= {"kept": float(kept[here].mean()), "outside": float(np.nanmean(outside[here]))}
        if difference is not None:
            table[kind] |= zip(("gain", "gain_error"), mean_and_error(difference[here]), strict=True)
    return table


def as_markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns the measures of all settings as a table."""
    lines = ["| setting | edit | done, % | gain | kept, % | outside |", "| --- | --- | --- | --- | --- | --- |"]
    for setting, table in results.items():
        for kind, row in table.items():
            done = f"{100 * row['done']:.1f} ± {100 * row['done_error']:.1f}"
            gain = f"{100 * row['gain']:+.1f} ± {100 * row['gain_error']:.1f}" if "gain" in row else ""
            lines.append(f"| {setting} | {kind} | {done} | {gain} | {100 * row['kept']:.1f} | {row['outside']:.2f} |")
    return "\n".join(lines) + "\n"


def grid(edits: Sequence[Edit], images: dict[str, list[Image.Image]], per_kind: int = 4) -> Image.Image:
    """Returns the first edits of every kind, a row each: the image, then every setting's."""
    rows = [row for kind in KINDS for row in [i for i, edit in enumerate(edits) if edit.kind == kind][:per_kind]]
    side, columns = SIZE * _SCALE, {"image": [edit.image for edit in edits], **images}
    cell = side + 2 * _LABEL
    canvas = Image.new("RGB", (max(len(columns) * (side + 4), 320), _LABEL + cell * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (name, column_images) in enumerate(columns.items()):
        draw.text((column * (side + 4), 0), name, fill="black")
        for line, row in enumerate(rows):
            large = column_images[row].resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(large, (column * (side + 4), _LABEL + line * cell + 2 * _LABEL - 2))
    for line, row in enumerate(rows):
        words = f"{edits[row].source.caption}\n-> {edits[row].target.caption}"
        draw.multiline_text((0, _LABEL + line * cell), words, fill="black", spacing=0, font_size=9)
    return canvas


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Runs what the command line says and returns the measures by setting and kind of edit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder of a base pipeline")
    parser.add_argument("--adapter", help="folder or file of soft tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--count", type=int, default=64, help="edits of every kind (default: 64)")
    parser.add_argument("--steps", type=int, default=SETTINGS["num_inference_steps"])
    parser.add_argument("--strength", type=float, default=SETTINGS["strength"], help="share of the steps that run")
    parser.add_argument("--source-guidance", type=float, default=SETTINGS["source_guidance_scale"])
    parser.add_argument("--target-guidance", type=float, default=SETTINGS["target_guidance_scale"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    pipe = StableDiffusion3Pipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    if args.adapter is not None:
        pipe.load_softrepa(args.adapter)
    edits = draw_edits(args.count, args.seed)
    settings = {
        "num_inference_steps": args.steps,
        "strength": args.strength,
        "source_guidance_scale": args.source_guidance,
        "target_guidance_scale": args.target_guidance,
    }
    images = {"autoencoder": autoencoded(pipe, edits)}
    for name in ("base", "adapter")[: 1 + (args.adapter is not None)]:
        images[name] = run(pipe, edits, batch=args.batch_size, adapter=name == "adapter", **settings)
    results = {
        name: measure(edits, made, images["base"] if name == "adapter" else None) for name, made in images.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"settings": {**settings, "count": args.count, "seed": args.seed}, "results": results}
    (args.out / "edits.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "edits.md").write_text(as_markdown(results), encoding="utf-8")
    grid(edits, images).save(args.out / "edits.png")
    print(as_markdown(results))
    return results


if __name__ == "__main__":
    main()
