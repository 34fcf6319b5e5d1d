from __future__ import annotations

import pytest

from asr_kd.errors import UserError
from asr_kd.shards.quarantine import Quarantine


def bad(count: int, **attributes: object) -> Quarantine:
    quarantine = Quarantine(total=10, share=0.2, **attributes)  # type: ignore[arg-type]
    for number in range(count):
        quarantine.add(f"u{number}", f"u{number}: empty")
    return quarantine


def test_as_many_as_the_share_are_let_through() -> None:
    for count in (0, 1, 2):
        assert not bad(count).too_many
        bad(count).refuse("here")


def test_more_are_refused_with_the_first_of_them() -> None:
    message = (
        r"^here: 3 of 10 utterances cannot be read, more than max_bad_share 0\.2 \(first: u0: empty\); look, or raise"
    )
    with pytest.raises(UserError, match=message):
        bad(3, done="read").refuse("here", "look")


def test_none_that_is_good_is_refused_whatever_the_share() -> None:
    all_of_them = bad(10)
    all_of_them.share = 1.0
    with pytest.raises(UserError, match=r"^here: none of 10 utterances can be used \(first: u0: empty\); fix them$"):
        all_of_them.refuse("here")
    all_of_them.all_may = True
    all_of_them.refuse("here")


def test_nothing_of_nothing_is_no_mistake() -> None:
    Quarantine(total=0, share=0.0).refuse("here")


def test_what_is_excused_counts_against_no_share_unless_there_is_nothing_else() -> None:
    quarantine = Quarantine(total=10, share=0.2)
    for number in range(7):
        quarantine.add(f"s{number}", "silent", excused=True)
    quarantine.refuse("here")
    for number in range(2):
        quarantine.add(f"u{number}", "empty")
    quarantine.refuse("here")
    assert quarantine.count == 9 and quarantine.first == ("u0", "empty")
    quarantine.add("s9", "silent", excused=True)
    with pytest.raises(UserError, match=r"^here: none of 10 utterances can be used \(first: u0: empty\)"):
        quarantine.refuse("here")
    quarantine = Quarantine(total=10, share=0.2)
    quarantine.add("s", "silent", excused=True)
    for number in range(3):
        quarantine.add(f"u{number}", "empty")
    with pytest.raises(UserError, match=r"^here: 3 of 10 utterances cannot be used"):
        quarantine.refuse("here")
