"""`softrepa push`: uploads an adapter's folder to the Hugging Face Hub.

softrepa push FOLDER user/my-tokens --private
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint import load_checkpoint
from ..hub import CARD_NAME, check_login, push_folder
from ..quoting import one_line

_FILES = ("adapter_model.safetensors", "adapter_config.json", CARD_NAME)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="softrepa push",
        description="Uploads an adapter's folder to the Hugging Face Hub. The adapter is checked first.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="folder of an adapter, as training and save_softrepa write it")
    parser.add_argument("repo_id", help="repository, such as user/my-tokens; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", metavar="TEXT", help="branch to commit to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit_message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--token", metavar="TEXT", help="Hub token; the stored one unless given")
    parser.add_argument("--dry_run", action="store_true", help="print what would be uploaded, and stop")
    return parser


def main(argv: Sequence[str]) -> None:
    """Uploads the folder and prints the URL of the commit."""
    given = parser().parse_args(argv)
    try:
        validate_repo_id(given.repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be a repository such as user/my-tokens, but: {one_line(error)}") from error
    folder = Path(given.folder).expanduser()
    load_checkpoint(folder)
    files = [name for name in _FILES if (folder / name).is_file()]
    if given.dry_run:
        print(f"would upload {', '.join(files)}, and the images that the card shows, to {given.repo_id}")
        return
    check_login(given.token)
    url = push_folder(
        folder,
        given.repo_id,
        files,
        private=given.private or None,
        token=given.token,
        commit_message=given.commit_message,
        create_pr=given.create_pr,
        revision=given.revision,
    )
    print(url)
