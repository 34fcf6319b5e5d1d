from __future__ import annotations

import inspect
import pkgutil

import pytest

from asr_kd.config.verbs import VERBS, Verb, name_of
from asr_kd.models.settings import ModelSettings


@pytest.mark.parametrize("verb", [verb for verb in VERBS.values() if verb.function], ids=lambda verb: verb.name)
def test_what_a_verb_names_is_there_and_takes_its_settings(verb: Verb) -> None:
    (parameter,) = inspect.signature(pkgutil.resolve_name(f"asr_kd.{verb.function}")).parameters.values()
    assert parameter.annotation == verb.kind().__name__


def test_settings_are_named_by_their_verb() -> None:
    assert [name_of(verb.kind()) for verb in VERBS.values() if verb.settings] == [
        verb.name for verb in VERBS.values() if verb.settings
    ]
    assert name_of(ModelSettings) == "ModelSettings"
