"""Knowledge distillation for speech recognition: teacher, unlabelled audio, small streaming student, WER report.

Jobs are run by the command `asr-kd`. In Python, and in a notebook, this package has a few functions of its own; each is loaded when it
is first asked for, so that `import asr_kd` is done at once. They are described in api/README.md:

- `load`: a checkpoint, or a model from outside, that transcribes, streams and gives posteriors;
- `dataset`, `soft_targets`: audio shards and soft targets, for loops of your own;
- `losses`: what a student can learn from soft targets, for networks of your own;
- `word_errors`: errors of texts, counted as `asr-kd eval` counts them;
- `UserError`, and of audio `AudioError`: one sentence that says what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asr_kd.api import losses as losses
    from asr_kd.api.recogniser import load as load
    from asr_kd.api.soft_targets import soft_targets as soft_targets
    from asr_kd.api.wer import word_errors as word_errors
    from asr_kd.errors import AudioError as AudioError
    from asr_kd.errors import UserError as UserError
    from asr_kd.shards.samples import dataset as dataset

    __version__: str

#: what there is, and where
_NAMES = {
    "AudioError": "errors:AudioError",
    "UserError": "errors:UserError",
    "dataset": "shards.samples:dataset",
    "load": "api.recogniser:load",
    "losses": "api.losses",
    "soft_targets": "api.soft_targets:soft_targets",
    "word_errors": "api.wer:word_errors",
}
__all__ = ["AudioError", "UserError", "__version__", "dataset", "load", "losses", "soft_targets", "word_errors"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from asr_kd.version import version

        return version()
    if name not in _NAMES:
        import difflib

        # `targets` is in `soft_targets`, and too short to be near it
        near = difflib.get_close_matches(name, __all__, 1) or [one for one in __all__ if len(name) > 3 and name in one]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    import pkgutil

    return pkgutil.resolve_name(f"{__name__}.{_NAMES[name]}")


def __dir__() -> list[str]:
    return __all__
