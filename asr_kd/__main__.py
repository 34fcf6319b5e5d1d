"""The program `asr-kd`, also `python -m asr_kd`: what Ctrl-C interrupts before the command line is loaded ends as any other job does."""

from __future__ import annotations

import sys
from typing import NoReturn


def command() -> NoReturn:
    """Run the command line, see `asr_kd.cli.command`."""
    try:
        from asr_kd.cli import command as run
    except KeyboardInterrupt:
        sys.exit(130)  # `Status.INTERRUPTED`, which may not be loaded yet
    run()


if __name__ == "__main__":
    command()
