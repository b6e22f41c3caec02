"""`datapipe`, and `python -m datapipe`, which is the same."""

import signal
import sys


def main() -> int:
    """Import the commands and run one; its exit code. Ctrl-C during the import just ends it."""
    takes_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if takes_ctrl_c:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from datapipe.cli.main import main as run
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] == "datapipe":
            raise
        sys.exit(
            f"datapipe: {exc.name} is not installed for {sys.executable}: in a checkout `make run` "
            "installs what is needed into .venv, and `. .venv/bin/activate` has this terminal use "
            "it"
        )
    if takes_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
