from tests.training.conftest import letters, units

__all__ = ["letters", "units"]
