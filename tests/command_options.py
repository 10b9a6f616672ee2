"""The tables of options in docs/command.md, made from the parsers: `python tests/command_options.py` writes them."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from diffusers_softrepa.commands import edit, evaluate, generate, info, push, train
from diffusers_softrepa.commands.settings import parser_of
from diffusers_softrepa.quoting import markdown_table
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments

PAGE = Path(__file__).parents[1] / "docs" / "command.md"
FROM_SETTINGS = {"generate": generate, "edit": edit, "evaluate": evaluate, "train": train}
OTHERS = {"info": info, "push": push}
_TABLE = re.compile(r"(<!-- options of (\w+) -->\n)(.*?)(<!-- end of options -->\n)", re.DOTALL)


def with_options(page: str) -> str:
    """Returns the page with the tables as the parsers have them now."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[4]}", page)


def named(page: str) -> list[str]:
    """Returns the commands that have a table on the page."""
    return [found[2] for found in _TABLE.finditer(page)]


def table(name: str) -> str:
    return markdown_table(["option", "meaning"], list(rows(parser(name))))


def parser(name: str) -> argparse.ArgumentParser:
    if name in OTHERS:
        return OTHERS[name].parser()
    module = FROM_SETTINGS[name]
    classes = [one for one in module.OPTIONS if one is not ContrastiveFlowMatchingArguments]  # in docs/training.md
    return parser_of(name, module.MEANING, classes)


def rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yields each option but `--help`, and its meaning, choices and default; two columns fit on a phone."""
    for action in parser._actions:
        if (
            action.dest == "help"
            or action.help == argparse.SUPPRESS
            or str(action.option_strings[:1]).startswith("['--no_")
        ):
            continue
        name = action.option_strings[0] if action.option_strings else action.dest
        parts = [action.help or ""]
        if action.choices:
            parts.append(f"One of {', '.join(map(str, action.choices))}")
        if action.required or not action.option_strings:
            parts.append("**Required**")
        elif action.default not in (None, argparse.SUPPRESS) and action.default != []:
            parts.append(f"Default: `{shown(action.default)}`")
        yield f"`{name}`", " ".join(f"{cell(part)}." for part in parts)


def shown(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("%%", "%").rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(with_options(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
