from tests.training.conftest import audio, development, job, letters, targets, units

__all__ = ["audio", "development", "job", "letters", "targets", "units"]
