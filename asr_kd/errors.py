"""What a user can cause and fix: one sentence that names the file, key or value and says what to do."""

from __future__ import annotations

import importlib.util


class UserError(Exception):
    """A mistake in the input or the settings; the command line prints it as one line and exits with status 2."""


class AudioError(UserError):
    """Audio that cannot be used. Long jobs quarantine the utterance and go on."""


def check_installed(role: str, package: str, extra: str) -> None:
    """Refuse what needs a package that is not there, before any work.

    Args:
        role: what needs it, for the message.
        package: as it is imported.
        extra: of asr-kd that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{role}: {package} is not installed; run `pip install 'asr-kd[{extra}]'`")
