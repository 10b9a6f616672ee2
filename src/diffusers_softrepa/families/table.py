"""The page of all families, written from their specs.

`python -m diffusers_softrepa.families.table > docs/families.md`
"""

from collections.abc import Iterable

from .spec import BlockGroup, ExtendedArgument, FamilySpec

_HEAD = """\
<!-- Written by `python -m diffusers_softrepa.families.table` from the specs; edit those instead. -->

# Families

A denoiser takes soft tokens when its class, or one it derives from, is in this table.
`diffusers_softrepa.supported_denoisers()` returns the classes; [Adding a family](adding_a_family.md) says how to
describe another one, and [Training](training.md) which can be trained.

- **text** is the block argument into which tokens go. *Read* text is the same for all blocks; *dual* text is returned
  by each block and the tokens are cut off it; *joint* text is in one sequence with the image.
- **grows** is what must be longer by the tokens as well: masks, rotary rows, modulation.
- **clock** is how the denoiser gets the noise level.
"""


def families_page(specs: Iterable[FamilySpec]) -> str:
    """Returns the page, Markdown."""
    ordered = sorted(specs, key=lambda spec: spec.denoiser.lower())
    rows = [_row(spec) for spec in ordered]
    head = "| denoiser | family | blocks: text | grows | clock |\n| --- | --- | --- | --- | --- |"
    return "\n".join([_HEAD, f"{len(rows)} classes:\n", head, *rows]) + "\n"


def _row(spec: FamilySpec) -> str:
    blocks = "<br>".join(f"`{group.path}`: {_text(group)}" for group in spec.groups)
    grown = dict.fromkeys(_grown(side) for group in spec.groups for side in group.extended)
    return f"| `{spec.denoiser}` | `{spec.name}` | {blocks} | {', '.join(grown) or 'nothing'} | {_clock(spec)} |"


def _text(group: BlockGroup) -> str:
    names = " and ".join(f"`{name}`" for name in group.texts)
    kind = "joint" if group.returns == "self" else "read" if group.returns is None else "dual"
    return f"{names}, {kind}" + (", at its projections" if group.level == "kv" else "")


def _grown(side: ExtendedArgument) -> str:
    return f"`{side.arg}`" if side.select is None else f"`{side.arg}[{side.select!r}]`"


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
