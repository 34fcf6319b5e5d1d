"""A command as a process of its own, and what the system counted of it."""

from __future__ import annotations

import os
import resource
import subprocess


def usage_of(command: list[str]) -> resource.struct_rusage:
    """Run a command to its end and return its resource usage; its standard output is dropped.

    Raises:
        SystemExit: when it fails, with what it wrote to standard error.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with process.stderr:
        said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said.decode(errors="replace"))
    return usage
