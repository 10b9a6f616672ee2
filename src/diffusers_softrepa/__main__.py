"""`python -m diffusers_softrepa`: the `softrepa` command, for launchers that start modules."""

import sys

from softrepa_command import main

if __name__ == "__main__":
    sys.exit(main())
