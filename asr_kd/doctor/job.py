"""The verb `doctor`, from the top: `doctor` looks at everything and prints it. Nothing is imported before it is asked for: it may be broken."""

from __future__ import annotations

import json
from typing import Any

from asr_kd.doctor.machine import cpu, folder_found, packages, platform_found, shared_memory, torch_found
from asr_kd.doctor.settings import DoctorSettings
from asr_kd.summary import tell_summary


def doctor(settings: DoctorSettings) -> bool:
    """Print what an answer to a question about this machine needs: versions, devices, space, and whether the jobs run.

    It holds no names of users, no environment, and no paths but those of the settings and of the temporary folder.

    Returns:
        whether nothing is wrong.
    """
    base, extras = packages()
    found: dict[str, Any] = {
        **platform_found(),
        "packages": base,
        "extras": extras,
        "cpu": cpu(),
        "torch": torch_found(),
        "folders": [folder_found(settings.folder), folder_found(None), shared_memory()],
    }
    problems = [f"{name} is not installed" for name, version in base.items() if version is None]
    problems += [one["problem"] for one in (found["torch"], *found["folders"]) if one.get("problem")]
    if settings.test:
        from asr_kd.doctor.trial import trial

        found["test"] = trial(settings.device)
        problems += [f"{one['step']}: {one['problem']}" for one in found["test"] if one["problem"]]
    found["problems"] = problems
    tell_summary(figures={"problems": problems})
    print(json.dumps(found, indent=2, ensure_ascii=False) if settings.details else "\n".join(_lines(found)))
    return not problems


def _lines(found: dict[str, Any]) -> list[str]:
    rows = [
        ("asr_kd", f"{found['asr_kd']}, Python {found['python']}, {found['platform']}"),
        ("packages", _listed(found["packages"])),
    ]
    for name, one in found["extras"].items():
        missing = "" if all(one.values()) else f"; pip install 'asr-kd[{name}]'"
        rows.append((f"extra {name}", _listed(one) + missing))
    cpu, torch = found["cpu"], found["torch"]
    cores = f"{cpu['usable']} of {cpu['cores']} cores" if cpu["usable"] != cpu["cores"] else f"{cpu['cores']} cores"
    rows.append(("CPU", f"{cpu['name']}, {cores}, {_size(cpu['memory'])} of memory{_limit(cpu['memory_limit'])}"))
    if "problem" not in torch:
        rows.append(("torch", f"{torch['threads']} threads, {torch['instructions']}, CUDA {torch['cuda'] or 'not built in'}"))  # fmt: skip
        rows += [(one["device"], f"{one['name']}, {_size(one['memory'])}") for one in torch["devices"]]
        if not torch["devices"]:
            rows.append(("GPU", "none"))
    for one in found["folders"]:
        space = f"{_size(one['free'])} free of {_size(one['size'])}" if "free" in one else "no space to tell"
        rows.append((one["what"], f"{one['path']}: {one.get('problem') or space}"))
    rows += [
        (f"test: {one['step']}", one["problem"] or f"works, {one['seconds']:.1f} s") for one in found.get("test", [])
    ]
    rows += [("wrong", problem) for problem in found["problems"]] or [("wrong", "nothing")]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'is missing'}" for name, version in versions.items())


def _limit(limit: int | None) -> str:
    return "" if limit is None else f", of which {_size(limit)} may be used"


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
