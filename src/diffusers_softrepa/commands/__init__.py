"""The sub-commands of `softrepa`, one module each, with a function `main` that takes the options.

A sub-command raises errors; `run` turns them into one line, `error: ...`, and an exit status.
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from ..compat import drop_torchvision_hints
from ..quoting import one_line
from .output import survivable_output

_USAGE_ERRNOS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


def run(name: str, argv: Sequence[str]) -> int:
    """Runs a sub-command and returns the exit status.

    Args:
        name: The sub-command.
        argv: Options of the sub-command. With `--debug` among them errors are raised, with their traceback.

    Returns:
        0 if it finished; 1 if it failed while it ran; 2 if the options, or the files, models and data that they name,
        are not valid; 130 if it was interrupted from the keyboard.
    """
    words = [_at_home(word) for word in argv if word != "--debug"]
    debug = len(words) < len(argv)
    with survivable_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        drop_torchvision_hints()
        for chatty in ("httpx", "httpcore"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        try:
            importlib.import_module(f"{__name__}.{name}").main(words)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else SUCCESS if stop.code is None else FAILURE
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if debug:
                raise
            print(f"error: {_sentence(error)}", file=sys.stderr)
            return USAGE if _is_usage(error) else FAILURE
    return SUCCESS


def _at_home(word: str) -> str:
    """Returns a word with `~` replaced by the home folder, which shells do for some of the words only."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (os.path.expanduser(value) if value == "~" or value.startswith("~/") else value)


def _is_usage(error: Exception) -> bool:
    """Whether an error is about the options and not about the run."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _USAGE_ERRNOS
    return isinstance(error, ValueError | TypeError | ImportError | KeyError | OSError)


def _sentence(error: Exception) -> str:
    """Returns an error as one line, with its type in front unless its text is a full sentence."""
    text = one_line(error.args[0] if isinstance(error, KeyError) and error.args else error, 1000)
    known = isinstance(error, ValueError | OSError | ImportError | KeyError | FloatingPointError)
    return text if text and known else f"{type(error).__name__}: {text}" if text else type(error).__name__
