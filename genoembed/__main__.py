"""The command line, as ``genoembed`` and as ``python -m genoembed``."""

from __future__ import annotations

import signal


def run() -> None:
    """Run the command line; until it handles signals itself, Ctrl-C ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from genoembed.cli import main  # takes a moment, in which Ctrl-C may come

    main(prog_name="genoembed")


if __name__ == "__main__":
    run()
