"""Entry point of `python -m diffusers_softrepa.convert`."""

from .command import main

main()
