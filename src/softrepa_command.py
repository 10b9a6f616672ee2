"""The `softrepa` command: its help, and the import of each sub-command.

This module is not part of the package, because importing the package imports torch and diffusers, which takes seconds.
`softrepa --help` needs neither.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    "train": "train soft tokens on your own images",
    "generate": "draw prompts without and with an adapter, side by side",
    "edit": "edit images by text, without and with an adapter, side by side",
    "evaluate": "compare the base model and adapters on a set of prompts",
    "info": "print what an adapter contains and which denoisers it fits",
    "convert": "convert soft tokens from and to the formats of other programs",
    "push": "upload an adapter's folder to the Hugging Face Hub",
}

_USAGE = "usage: softrepa COMMAND [options]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command and returns the exit status: 0 if it finished, 1 if it failed, 2 for a wrong command line.

    Args:
        argv: The command line without the name of the program. Defaults to that of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in COMMANDS:
        from diffusers_softrepa.commands import run

        return run(name, words[1:])
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"softrepa {version('diffusers-softrepa')}")
        return 0
    print(f"error: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def help_text() -> str:
    """Returns the text that `softrepa --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            _USAGE,
            "",
            "Soft text tokens (SoftREPA) for frozen diffusers pipelines.",
            "",
            "commands:",
            *lines,
            "",
            "softrepa COMMAND --help lists the options of a command, softrepa --version the version.",
            "`accelerate launch -m diffusers_softrepa COMMAND ...` runs train and evaluate on several processes.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
