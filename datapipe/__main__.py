"""`python -m datapipe`: the same as `datapipe`."""

import sys

try:
    from datapipe.cli.main import main
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] == "datapipe":
        raise
    sys.exit(
        f"datapipe: {exc.name} is not installed for {sys.executable}: in a checkout `make run` "
        "installs what is needed into .venv, and `. .venv/bin/activate` has this terminal use it"
    )

if __name__ == "__main__":
    sys.exit(main())
