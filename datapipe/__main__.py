"""`python -m datapipe`: the same as `datapipe`."""

import sys

from datapipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
