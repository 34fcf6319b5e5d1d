from tests.training.conftest import audio, development, job, letters, resumed, targets, units

__all__ = ["audio", "development", "job", "letters", "resumed", "targets", "units"]
