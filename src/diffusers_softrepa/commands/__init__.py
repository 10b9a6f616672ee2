"""The sub-commands of `softrepa`: one module each, which names its options in dataclasses and does the work in `run`.

A sub-command raises what is wrong; here it becomes one line, `error: ...`, and an exit status.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from ..quoting import one_line
from .output import survivable_output

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


def run(name: str, argv: Sequence[str]) -> int:
    """Runs a sub-command and returns the exit status.

    Args:
        name: The sub-command.
        argv: Its options. With `--debug` among them errors are raised, so that their traceback shows.

    Returns:
        0 when it is done; 1 when it failed while it ran; 2 when the options, or the files, models and data that they
        name, are not as they should be; 130 when it was interrupted from the keyboard.
    """
    words = [word for word in argv if word != "--debug"]
    debug = len(words) < len(argv)
    with survivable_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s")
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


def _is_usage(error: Exception) -> bool:
    """Whether an error is about what was asked for, and not about what happened while it was done."""
    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError)
    return isinstance(error, ValueError | TypeError | ImportError | KeyError | OSError)


def _sentence(error: Exception) -> str:
    """Returns an error as one line, its kind first where the text was not written to stand alone."""
    text = one_line(error.args[0] if isinstance(error, KeyError) and error.args else error, 1000)
    known = isinstance(error, ValueError | OSError | ImportError | KeyError | FloatingPointError)
    return text if text and known else f"{type(error).__name__}: {text}" if text else type(error).__name__
