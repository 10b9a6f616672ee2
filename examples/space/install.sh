#!/usr/bin/env bash
# Makes the environment of the page, .venv/space. It is not that of the tests, because gradio 6 wants pillow below 13;
# all other versions are those of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python3}" -m venv .venv/space
grep -v '^pillow==' constraints.txt >.venv/space/constraints.txt
install() { .venv/space/bin/python -m pip install --quiet --constraint .venv/space/constraints.txt "$@"; }
install torch
install --editable ".[space]"
install --requirement examples/space/requirements.txt
install --no-deps --editable examples # the shapes world; its training needs more, the page does not
.venv/space/bin/python -m pip check
