"""What a CLIP score sees: it and the oracle judge the same images of the shapes world.

    python research/agreement.py clean --out outputs/agreement      # clean images; draws nothing
    python research/agreement.py --out outputs/agreement            # and prompts and edits, with adapters

    clean     for clean images, how often the true caption scores higher than one that is false in one thing, by what
              is false (0.5: blind); `another image` is a caption of one, what CLIP models learn to tell apart
    images  prompts drawn by the base and every adapter: how well the score tells right images from wrong ones
              (area under the ROC curve, 0.5: blind), and whether it ranks settings as the oracle does
    edits     the same of edited images, under the caption of what they shall show

The folder gets `agreement.md`, `agreement.json` and `agreement.png`, and the evaluation's own tables and images.
Images of prompts are kept, so the command can be interrupted, and seeds and adapters be added.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from agreement_tables import CLEAR, UNEDITED, Found, as_markdown, plot
from diffusers_softrepa.evaluation import CLIPScore, EvaluationResult, evaluate, score
from diffusers_softrepa.evaluation.result import Row, without_nan
from roc import auc, auc_within
from shapes_world import edits as edited
from shapes_world.drawing import BASE, FOLDER, STEPS, load_base, mean_and_error
from shapes_world.models import MAX_WORDS
from shapes_world.oracle_metric import OracleMetric, as_prompts
from shapes_world.world import SKILLS, Ask, Thing, prompts, random_ask, random_background, render

CLIP = Path(__file__).parent / "clip"
ADAPTERS = (FOLDER / "adapter",)
PARTS = ("clean", "images", "edits")
# Of false captions: a caption of another image; another colour or shape; another number; attributes or numbers of
# two things exchanged; another relation; and things exchanged so that nothing but their relation is false.
KINDS = ("another image", "attribute", "number", "swap", "relation", "order")
_CHUNK = 256  # images or captions at once


def clip_score(folder: Path | str = CLIP) -> CLIPScore:
    """Returns the package's CLIP score with the CLIP of the world, which has no words for a prefix: a plain cosine."""
    return CLIPScore(str(folder), weight=1.0, prefix="", name="clip_score")


# Clean images.


def false_captions(
    ask: Ask, things: Sequence[Thing], rng: np.random.Generator, others: int = 8
) -> dict[str, list[Ask]]:
    """Returns asks that are false of an image by what is wrong in them, put like the true one."""
    found = {KINDS[0]: [random_ask(rng) for _ in range(others)], **ask.negatives()}
    found = {kind: [wrong for wrong in asks if not wrong.true_of(things)] for kind, asks in found.items()}
    order = [wrong for wrong in found["swap"] if replace(wrong, relation=None).true_of(things)]
    return {**found, "swap": [wrong for wrong in found["swap"] if wrong not in order], "order": order}


@torch.no_grad()
def clean(metric: CLIPScore, per_skill: int, seed: int) -> Found:
    """Returns how often the true caption of a clean image wins, by skill and kind of false caption.

    Every image counts once, however many false captions it has.
    """
    metric.setup(torch.device("cpu"))
    rng, asks = np.random.default_rng(seed), prompts(per_skill, seed)
    scenes = [ask.scene(rng) for ask in asks]
    false = [false_captions(ask, things, rng) for ask, things in zip(asks, scenes, strict=True)]
    images = _features(metric.loaded.images, [render(things, random_background(rng)) for things in scenes])
    told = {wrong.caption for kinds in false for wrongs in kinds.values() for wrong in wrongs}
    captions = sorted(told | {ask.caption for ask in asks})
    texts = dict(zip(captions, _features(metric.loaded.texts, captions), strict=True))
    metric.close()
    shares = {skill: {kind: [] for kind in KINDS} for skill in SKILLS}
    for ask, image, kinds in zip(asks, images, false, strict=True):
        true = float(image @ texts[ask.caption])
        for kind, wrongs in kinds.items():
            rest = [float(image @ texts[wrong.caption]) for wrong in wrongs]
            if rest:
                shares[ask.skill][kind].append(
                    float(np.mean([(true > value) + 0.5 * (true == value) for value in rest]))
                )
    pooled = {kind: [share for skill in SKILLS for share in shares[skill][kind]] for kind in KINDS}
    return {
        name: {kind: _mean(values) for kind, values in row.items()} for name, row in {**shares, "all": pooled}.items()
    }


def _features(encode: Callable[[Sequence[Any]], Tensor], inputs: Sequence[Any]) -> Tensor:
    """Returns unit vectors of images or captions, (n, width)."""
    parts = [encode(inputs[at : at + _CHUNK]) for at in range(0, len(inputs), _CHUNK)]
    return normalize(torch.cat(parts).float(), dim=-1)


def _mean(values: Sequence[float]) -> dict[str, float]:
    share, error = mean_and_error(values) if values else (math.nan, math.nan)
    return {"share": share, "error": error, "images": len(values)}


# Drawn and edited images.


def compared(result: EvaluationResult, leave_out: Sequence[str] = ()) -> Found:
    """Returns how the two scores judge settings and images.

    Args:
        result: Holds `clip_score` and `oracle` of every image; settings are compared with its first.
        leave_out: Settings whose images are not told apart.
    """
    chosen = [index for index, setting in enumerate(result.settings) if setting not in leave_out]
    scores = result.scores["clip_score"][chosen].numpy()
    right = result.scores["oracle"][chosen].numpy() > 0.5
    groups = np.broadcast_to(np.arange(scores.shape[1])[None, :, None], scores.shape)
    categories = {name: np.array([c == name for c in result.categories]) for name in result.category_names}
    areas = {}
    for name, here in {**categories, "all": np.ones(scores.shape[1], dtype=bool)}.items():
        flat = [values[:, here].ravel() for values in (scores, right, groups)]
        areas[name] = {"right": int(flat[1].sum()), "wrong": int((~flat[1]).sum())}
        for kind, area in {"auc": auc(*flat), "within": auc_within(*flat)}.items():
            areas[name] |= {kind: area.value, f"{kind}_error": area.error, f"{kind}_count": area.count}
    rows = [
        {"setting": setting, "category": category or "all", **_both(result, setting, category)}
        for setting in result.settings
        for category in (*result.category_names, None)
    ]
    return {"areas": areas, "settings": rows}


def _both(result: EvaluationResult, setting: str, category: str | None) -> Found:
    found: Found = {}
    clip, oracle = (result.row(setting, name, category) for name in ("clip_score", "oracle"))
    for name, row in {"clip": clip, "oracle": oracle}.items():
        found |= {name: row.mean, f"{name}_error": row.error}
        found |= {f"{name}_difference": row.difference, f"{name}_difference_error": row.difference_error}
    return found | {"verdict": verdict(clip, oracle) if setting != result.settings[0] else ""}


def verdict(clip: Row, oracle: Row) -> str:
    """Returns whether two scores say the same of a setting, as far as each says anything."""
    signs = [
        math.copysign(1, row.difference) * (abs(row.difference) > CLEAR * row.difference_error)
        for row in (clip, oracle)
    ]
    if not any(signs):
        return "neither sees a difference"
    if not all(signs):
        return "CLIP alone sees a difference" if signs[0] else "the oracle alone sees a difference"
    return "agree" if signs[0] == signs[1] else "contradict each other"


def images(pipe: Any, metric: CLIPScore, names: Sequence[str], args: argparse.Namespace) -> Found:
    """Draws prompts in every setting and lets both judge them."""
    result = evaluate(
        pipe,
        as_prompts(prompts(args.per_skill, args.seed)),
        metrics=[metric, OracleMetric()],
        adapters=[None, *names],
        seeds=range(args.seeds),
        output_dir=args.out / "images",
        batch_size=args.batch_size,
        num_inference_steps=STEPS,
        guidance_scale=args.guidance,
        max_sequence_length=MAX_WORDS,
    )
    return compared(result)


def edits(pipe: Any, metric: CLIPScore, names: Sequence[str], args: argparse.Namespace) -> Found:
    """Edits images in every setting and lets both judge them; those left alone as well."""
    drawn = edited.draw_edits(args.edits, args.seed)
    made = {"base": edited.run(pipe, drawn, batch=args.batch_size, adapter=False, **edited.SETTINGS)}
    for name in names:
        pipe.set_softrepa(name)
        made[name] = edited.run(pipe, drawn, batch=args.batch_size, adapter=True, **edited.SETTINGS)
    edited.grid(drawn, made).save(args.out / "edits.png")
    made[UNEDITED] = [edit.image for edit in drawn]
    prompts_of_edits = as_prompts([edit.target for edit in drawn])
    asked = [replace(prompt, category=edit.kind) for prompt, edit in zip(prompts_of_edits, drawn, strict=True)]
    return compared(score(made, asked, [metric, OracleMetric()]), leave_out=[UNEDITED])


def main(arguments: Sequence[str] | None = None) -> dict[str, Found]:
    """Runs what the command line says and returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--clip", type=Path, default=CLIP, help="folder of the CLIP")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapter", type=Path, nargs="*", default=list(ADAPTERS), help="folders of soft tokens")
    parser.add_argument("--out", type=Path, default=Path("outputs/agreement"))
    parser.add_argument("--clean", type=int, default=300, help="clean images of every skill (default: 300)")
    parser.add_argument("--per-skill", type=int, default=40, help="prompts of every skill (default: 40)")
    parser.add_argument("--seeds", type=int, default=4, help="images of every prompt and setting (default: 4)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--edits", type=int, default=64, help="edits of every kind (default: 64)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"a part is one of {', '.join(PARTS)}, but {', '.join(sorted(unknown))} was given")
    parts, metric, found = args.parts or PARTS, clip_score(args.clip), {}
    args.out.mkdir(parents=True, exist_ok=True)
    if "clean" in parts:
        found["clean"] = clean(metric, args.clean, args.seed)
    if set(parts) - {"clean"}:
        pipe = load_base(args.base)
        names = [folder.name for folder in args.adapter]
        for folder in args.adapter:
            pipe.load_softrepa(folder, adapter_name=folder.name)
        for part, judge in {"images": images, "edits": edits}.items():
            if part in parts:
                found[part] = judge(pipe, metric, names, args)
    (args.out / "agreement.json").write_text(json.dumps(without_nan(found), indent=1) + "\n", encoding="utf-8")
    (args.out / "agreement.md").write_text(as_markdown(found), encoding="utf-8")
    plot(found).savefig(args.out / "agreement.png", dpi=120)
    print(as_markdown(found))
    return found


if __name__ == "__main__":
    main()
