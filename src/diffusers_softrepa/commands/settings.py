"""Parsing of a command line, and of the settings file that it names, into the dataclasses of a sub-command.

Every option is a field of a dataclass, with its type, default and meaning. A YAML or JSON file has the same names;
options on the command line take precedence over it.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..files import parse_json
from ..quoting import one_line, quoted

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def option(meaning: str, default: Any = None) -> Any:
    """Returns a dataclass field for an optional setting.

    Args:
        meaning: Text for `--help`.
        default: Default of the setting. Defaults to None.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def needed(meaning: str) -> Any:
    """Returns a dataclass field for a setting that must be given.

    Args:
        meaning: Text for `--help`.
    """
    return field(metadata={"help": meaning})


class _Formatter(argparse.HelpFormatter):
    """Adds to the help of each option that it is required, or its default unless that is None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        return text if action.default in (None, argparse.SUPPRESS, []) else f"{text} (default: %(default)s)"


class Parser(HfArgumentParser):
    """A parser that raises a ValueError for a wrong command line, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def parser_of(name: str, meaning: str, classes: Sequence[type]) -> Parser:
    """Returns the parser of a sub-command.

    Args:
        name: Name of the sub-command.
        meaning: What the sub-command does, for `--help`.
        classes: Dataclasses of settings.
    """
    types: list[Any] = list(classes)
    parser = Parser(
        types,
        prog=f"softrepa {name}",
        description=meaning,
        usage=f"softrepa {name} [settings.yaml | --config settings.yaml] [--option value ...]",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _show_types(parser, classes)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of options; the command line takes precedence."
    )
    # `run` removes this option from the command line before; it is added here so that --help lists it.
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def parse(
    name: str,
    meaning: str,
    classes: Sequence[type],
    argv: Sequence[str],
    *,
    renamed: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> tuple[Any, ...]:
    """Returns the settings of a command line and of the file that it names, one object for each class.

    The file is given by `--config`, or as the first word.

    Args:
        name: The sub-command.
        meaning: What it does, for `--help`.
        classes: Dataclasses of settings.
        argv: The command line.
        renamed: Gives the settings of a file that was written before their present names.

    Raises:
        ValueError: A setting is unknown, missing or out of range, or the file is not YAML or JSON.
        OSError: There is no such file.
    """
    words = list(argv)
    if words and words[0].endswith(CONFIG_SUFFIXES):
        words = ["--config", *words]
    parser = parser_of(name, meaning, classes)
    known = {action.dest: action for action in parser._actions}
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    file = first.parse_known_args(words)[0].config
    if file is not None:
        settings = renamed(read_settings(Path(file).expanduser()))
        _check_known(settings, known.keys() - {"help", "config", "debug"}, file)
        for key in settings:
            known[key].required = False
        parser.set_defaults(**settings)  # strings are converted like those of the command line
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    flags = [word for word in unknown if word.startswith("--")]
    _check_known(
        [word.lstrip("-").split("=")[0].replace("-", "_") for word in flags], known.keys(), "the command line"
    )
    if unknown:
        raise ValueError(
            f"the command line has {quoted(unknown[0])}, which belongs to no option; quote texts with spaces"
        )
    return tuple(parsed)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML or JSON file, without those that are null; `~` is replaced by the home folder.

    Args:
        path: The file.

    Raises:
        ValueError: The file does not contain a mapping, or is neither YAML nor JSON.
        ImportError: The file is YAML and the package `pyyaml` is not installed.
        OSError: The file does not exist.
    """
    content = path.read_bytes()
    if path.suffix == ".json":
        settings = parse_json(content, str(path))
    else:
        try:
            import yaml
        except ImportError as error:
            raise ImportError(
                f"{path} is YAML, which needs `pip install pyyaml`; install it, or write the settings as JSON"
            ) from error
        try:
            settings = yaml.safe_load(content.decode("utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is neither YAML nor JSON: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must contain settings by name, such as `max_steps: 100`, but contains {quoted(settings)}"
        )
    return {name: _at_home(value) for name, value in settings.items() if value is not None}


def _at_home(value: Any) -> Any:
    """Returns a path with `~` replaced by the home folder, as a shell does; other values are returned unchanged."""
    is_path = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return os.path.expanduser(value) if is_path else value


def _check_known(names: Collection[str], known: Collection[str], where: str) -> None:
    """Checks that all names are settings; the error suggests a similar setting."""
    unknown = [name for name in names if name not in known]
    if unknown:
        close = get_close_matches(str(unknown[0]), list(known), 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the options"
        raise ValueError(f"{where} has unknown settings: {', '.join(map(str, unknown))}; {hint}")


def _show_types(parser: argparse.ArgumentParser, classes: Sequence[type]) -> None:
    """Makes `--help` name the type of each option, and allows empty lists."""
    kinds = {entry.name: entry.type for cls in classes for entry in dataclasses.fields(cls)}
    for action in parser._actions:
        kind = kinds.get(action.dest)
        if action.nargs == "+" and not action.required:
            action.nargs = "*"  # an empty list is valid
        if kind is None or action.choices is not None or action.nargs == 0:
            continue
        text = kind.__name__ if isinstance(kind, type) else str(kind)
        words = {"int": "NUMBER", "float": "NUMBER", "bool": "TRUE|FALSE"}
        action.metavar = next((word for name, word in words.items() if name in text), "TEXT")


def show(settings: object) -> str:
    """Returns settings as JSON text with one on each line, for a dry run."""
    return json.dumps(dataclasses.asdict(settings), indent=1, default=str)  # type: ignore[call-overload]
