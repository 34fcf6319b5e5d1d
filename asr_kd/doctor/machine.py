"""What a machine has: packages, processors, memory, space."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import create, place
from asr_kd.objects import ObjectPath

#: extras that no job needs
NOT_OF_JOBS = ("dev", "peers")
#: where processes that read side by side hand tensors to each other (Linux)
SHARED_MEMORY = Path("/dev/shm")
#: how much memory this process's group may use (Linux, of version 2 and 1)
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

Versions = dict[str, str | None]


def platform_found() -> dict[str, str]:
    """The versions that everything else depends on."""
    return {
        "asr_kd": _version("asr-kd") or "not installed",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
    }


def packages() -> tuple[Versions, dict[str, Versions]]:
    """Versions of the packages that all jobs need, and of those of each extra, as the installed asr-kd names them; None: missing."""
    base: Versions = {}
    extras: dict[str, Versions] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("asr-kd") or ():
            name = re.match(r"[\w.-]+", line)
            extra = re.search(r"""extra == ['"]([\w-]+)""", line)
            assert name is not None
            if extra is None:
                base[name[0]] = _version(name[0])
            elif extra[1] not in NOT_OF_JOBS:
                extras.setdefault(extra[1], {})[name[0]] = _version(name[0])
    with contextlib.suppress(ImportError, OSError):  # what reads audio files is a library of its own
        import soundfile

        base["libsndfile"] = soundfile.__libsndfile_version__
    return base, extras


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Name, cores, and memory in bytes; `usable` cores and `memory_limit` are what this process may use, where that is less."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        said = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = said[1] if said else name
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": name, "cores": cores, "usable": usable, "memory": memory, "memory_limit": _limit_below(memory)}


def _limit_below(memory: int) -> int | None:
    for file in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
            if (limit := int(file.read_text())) < memory:
                return limit
    return None


def torch_found() -> dict[str, Any]:
    """What torch computes with; `problem` where it, or torchaudio, cannot be loaded."""
    try:
        import torch
        import torchaudio  # noqa: F401  # one that was built for another torch fails here
    except Exception as error:  # a library that is missing is an OSError, another build anything
        return {"problem": f"torch cannot be loaded: {_one_line(error)}"}
    devices = []
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        devices.append({"device": f"cuda:{number}", "name": of.name, "memory": of.total_memory})
    return {
        "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(), "cuda": torch.version.cuda, "devices": devices
    }  # fmt: skip


def folder_found(name: str | None) -> dict[str, Any]:
    """The space of a folder, and whether a job can write there; None: that of temporary files. It is left as it was, and is not made."""
    what = "working folder" if name is not None else "temporary folder"
    try:
        path = place(name if name is not None else tempfile.gettempdir())
        if isinstance(path, ObjectPath):
            path.check_writable()
            return {"what": what, "path": str(path)}
        # jobs make the folders that are not there yet
        near = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
        with tempfile.TemporaryDirectory(prefix=".asr-kd-", dir=near) as within:
            file = Path(within) / "claim"  # jobs write aside and link, so that a file is there whole or not at all
            if not create(file, "first") or create(file, "second") or file.read_text() != "first":
                return {"what": what, "path": str(path), "problem": f"{path}: links do not work there; choose another"}
        return {"what": what, "path": str(path), **_space(near)}
    except (UserError, OSError) as error:
        where = name if name is not None else "TMPDIR"
        return {"what": what, "path": where, "problem": f"{where}: cannot be written ({_one_line(error)})"}


def shared_memory() -> dict[str, Any]:
    """Its space; none where the system has none that is a folder."""
    found = {"what": "shared memory", "path": str(SHARED_MEMORY)}
    return {**found, **_space(SHARED_MEMORY)} if SHARED_MEMORY.is_dir() else found


def _space(path: Path) -> dict[str, int]:
    usage = shutil.disk_usage(path)
    return {"free": usage.free, "size": usage.total}


def _one_line(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())
