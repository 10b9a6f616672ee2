"""Parsing of a command line, and of the settings file that it names, into the dataclasses of a sub-command.

Every option is a field of a dataclass, with its type, default and meaning. A YAML or JSON file has the same names;
options on the command line take precedence over it.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from ..files import parse_json
from ..quoting import is_text, one_line, quoted

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


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
        kinds = {name: kind for cls in classes for name, kind in get_type_hints(cls).items()}
        for key, value in settings.items():
            known[key].required = False
            # Strings are converted like those of the command line.
            parser.set_defaults(**{key: _of_kind(value, kinds[key], f"{key} in {file}")})
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
    for settings in parsed:
        for entry in dataclasses.fields(settings):
            _check_range(entry.name, getattr(settings, entry.name))
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

        class Loader(yaml.SafeLoader):
            """Refuses a key that is written twice."""

            def construct_mapping(self, node: Any, deep: bool = False) -> Any:
                keys = [key.value for key, _ in node.value]
                if twice := next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None):
                    raise yaml.constructor.ConstructorError(None, None, f"the key {quoted(twice)} is there twice")
                return super().construct_mapping(node, deep)

        try:
            settings = yaml.load(content.decode("utf-8-sig"), Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is neither YAML nor JSON: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must contain settings by name, such as `max_steps: 100`, but contains {quoted(settings)}"
        )
    return {name: _at_home(value) for name, value in settings.items() if value is not None}


def _of_kind(value: Any, kind: Any, where: str, *, listed: bool = False) -> Any:
    """Returns a value of a settings file in the type of its option.

    A mapping for a text becomes JSON text, unless it is `listed`, an entry of a list. Strings for options of other
    types are returned as they are.

    Raises:
        ValueError: It is of another type.
    """
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = [each for each in parts if each is not NoneType]
    if len(kinds) == 1 and get_origin(kinds[0]) is list:
        values = value if isinstance(value, list) else [value]
        return [_of_kind(each, get_args(kinds[0])[0], where, listed=True) for each in values]
    choices = [choice for each in kinds if get_origin(each) is Literal for choice in get_args(each)]
    if value in choices if choices else any(_is_of(value, each) for each in kinds):
        return value
    if str in kinds and isinstance(value, dict) and not listed:
        return json.dumps(value)
    if isinstance(value, str) and not choices and not listed:
        return value
    wanted = f"one of {', '.join(choices)}" if choices else " or ".join(_NAMES.get(each, str(each)) for each in kinds)
    advice = "; write texts in quotes" if str in kinds or choices else ""
    raise ValueError(f"{where} must be {wanted}, but is {quoted(value)}{advice}")


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_texts(settings: object, *names: str) -> None:
    """Checks that options hold texts, which words of a command line in another encoding are not.

    Args:
        settings: The dataclass of the options.
        names: The options: texts, lists of texts or None.

    Raises:
        ValueError: A text has a null character or half of a character.
    """
    for name in names:
        value = getattr(settings, name)
        for text in value if isinstance(value, list) else [value or ""]:
            if not is_text(text):
                raise ValueError(f"--{name} must be text in the encoding of the terminal, but is {quoted(text)}")


def _check_range(name: str, value: Any) -> None:
    """Checks that numbers are finite, and whole numbers not beyond what torch takes."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"{name} must be a finite number, but is {each}")
        if isinstance(each, int) and abs(each) >= 2**63:
            raise ValueError(f"{name} must be below 2**63 in size, but is {quoted(each)}")


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
