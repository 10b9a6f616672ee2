"""Writes the documentation page of all families from their specs.

`python -m diffusers_softrepa.families.table > docs/families.md`
"""

from collections.abc import Iterable

from .spec import BlockGroup, ExtendedArgument, FamilySpec

# Families that can be trained, with the names of their models, and those that are compared to the authors' code.
TRAINED = {
    "sd3": "SD 3, 3.5",
    "unet": "SD 1.x, 2.x, XL",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "chroma": "Chroma",
    "sana": "Sana",
    "pixart": "PixArt",
}
COMPARED = ("sd3", "unet")

_HEAD = """\
<!-- Written by `python -m diffusers_softrepa.families.table` from the specs; edit those instead. -->

# Families

| model | use | train | tested |
| --- | --- | --- | --- |
{summary}
| {others} other families | yes | no | denoiser |

- **use**: adapters can be loaded, weighted, combined and saved, and the pipeline samples with them.
- **train**: the trainer and the editing functions support the text-to-image pipelines of the family, which
  [Training](training.md#which-models) lists.
- **tested**: all tests run on small models with random weights. *denoiser*: calls of the denoiser obey the laws of
  `tests/test_family_laws.py`. *pipeline*: in addition, a whole pipeline encodes, trains and samples. *reference*: in
  addition, predictions, samples and losses equal those of the SoftREPA authors' code.

A denoiser takes soft tokens if its class, or a base class of it, has a spec.
`diffusers_softrepa.supported_denoisers()` returns these classes. [Adding a family](adding_a_family.md) explains how to
support another class.

The other families are {names}.

## How each family reads text

- **text** is the block argument into which tokens are inserted. *Read* text is the same for all blocks. *Dual* text is
  returned by each block, and the tokens are cut off it. *Joint* text is in one sequence with the image.
- **extended** lists other arguments with a row or column per text row: masks, rotary embeddings, modulation.
- **timestep** is the argument of the noise level, with its range.
"""


def families_page(specs: Iterable[FamilySpec]) -> str:
    """Returns the page as Markdown.

    Args:
        specs: The specs to list.
    """
    ordered = sorted(specs, key=lambda spec: spec.denoiser.lower())
    others = sorted(f"`{spec.name}`" for spec in ordered if spec.name not in TRAINED)
    head = _HEAD.format(
        summary="\n".join(
            f"| {model} | yes | yes | {'reference' if family in COMPARED else 'pipeline'} |"
            for family, model in TRAINED.items()
        ),
        others=len(others),
        names=", ".join(others),
    )
    rows = [_row(spec) for spec in ordered]
    columns = "| denoiser | family | blocks: text | extended | timestep |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, f"{len(rows)} classes:\n", columns, *rows]) + "\n"


def _row(spec: FamilySpec) -> str:
    blocks = "<br>".join(f"`{group.path}`: {_text(group)}" for group in spec.groups)
    extended = dict.fromkeys(_extended(argument) for group in spec.groups for argument in group.extended)
    return f"| `{spec.denoiser}` | `{spec.name}` | {blocks} | {', '.join(extended) or 'nothing'} | {_clock(spec)} |"


def _text(group: BlockGroup) -> str:
    names = " and ".join(f"`{name}`" for name in group.texts)
    kind = "joint" if group.returns == "self" else "read" if group.returns is None else "dual"
    return f"{names}, {kind}" + (", at its projections" if group.level == "kv" else "")


def _extended(argument: ExtendedArgument) -> str:
    return f"`{argument.arg}`" if argument.select is None else f"`{argument.arg}[{argument.select!r}]`"


def _clock(spec: FamilySpec) -> str:
    if spec.clock is not None:
        return "by its config"
    clock = spec.timestep
    top = f"{1000.0 / clock.scale:g}"
    span = f"{top} (noise) to 0" if not clock.reverse else f"0 (noise) to {top}"
    return f"`{clock.arg}`, {span}" + (f", less {clock.offset:g}" if clock.offset else "")


if __name__ == "__main__":
    from . import built_in_families

    print(families_page(built_in_families()), end="")
