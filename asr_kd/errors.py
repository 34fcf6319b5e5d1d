"""What a user can cause and fix: one sentence that names the file, key or value and says what to do."""


class UserError(Exception):
    """A mistake in the input or the settings; the command line prints it as one line and exits with status 2."""


class AudioError(UserError):
    """Audio that cannot be used. Long jobs quarantine the utterance and go on."""
