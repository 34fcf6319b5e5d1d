"""The file that makes a set of shards: which there are, beside it, elsewhere, or in other sets."""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from asr_kd.errors import UserError
from asr_kd.files import Place, local_copy, place, read_json, write_whole
from asr_kd.objects import ObjectPath
from asr_kd.shards.foreign import Reading
from asr_kd.shards.index import Origin, ShardElsewhere, ShardInfo, ShardList, read_pieces

FORMAT, INDEX = "asr_kd-shards", "index.json"
#: of the index of shards that lie beside it; and of one that names shards elsewhere, or other sets
VERSION, ELSEWHERE = 1, 2
#: in an index of shards elsewhere: somebody saw that no two utterances have the same key
KEYS_DIFFER = {"keys": "differ"}


def read_index(folder: Place | str | Sequence[str]) -> ShardList:
    """The shards of a set, as its index lists them, or of several sets, as `ShardList.joined`.

    UserError when an index is missing, damaged or of a newer version, a set that it names has changed since, or a shard is there twice.
    """
    return _read_index(folder, ())


def _read_index(folder: Place | str | Sequence[str], within: tuple[str, ...]) -> ShardList:
    if not isinstance(folder, Place | str):
        return _joined(" + ".join(folder), [(_absolute(one), _read_index(one, within)) for one in folder])
    folder = place(folder)
    path = folder / INDEX
    if not path.exists():
        what = "no such folder of shards" if not folder.is_dir() else f"holds no shards ({INDEX} is missing)"
        raise UserError(
            f"{folder}: {what}; check the path, finish `asr-kd prepare`, or run `asr-kd index` on tars that others wrote"
        )
    if str(folder) in within:
        raise UserError(
            f"{path}: names {' → '.join([*within, str(folder)])}, itself; make it again with `asr-kd index`"
        )
    shards, differ = None, False

    def origin(about: dict[str, Any]) -> Origin | None:
        nonlocal differ
        differ = _keys_differ(about)
        return _origin(folder, about)

    with suppress(OSError), local_copy(path) as copy, open(copy, "rb") as file:
        shards = read_pieces(file, origin)
        shards = shards.with_keys_apart() if shards and differ else shards
    if (
        shards is None
    ):  # laid out otherwise, an index of sets, or damaged: as a whole it takes more memory, and shows what is wrong
        shards = _read_whole(folder, (*within, str(folder)))
    if not shards.distinct:
        raise UserError(f"{path}: lists a shard twice; make the shards again")
    return shards


def _read_whole(folder: Place, within: tuple[str, ...]) -> ShardList:
    path = folder / INDEX
    value = read_json(path, "index of shards")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(
            f"{path}: not an index of audio shards; make it with `asr-kd prepare`, or elsewhere with `asr-kd index`"
        )
    version = value.get("version")
    if type(version) is not int or not 1 <= version <= ELSEWHERE:
        raise UserError(f"{path}: of version {version}, this program reads {ELSEWHERE}; use a newer asr_kd")
    try:
        if version == ELSEWHERE and "sets" in value:
            shards = _read_sets(folder, value["sets"], within)
        else:
            shards = ShardList.parse(json.dumps(value.get("shards")), _origin(folder, value))
        return shards.with_keys_apart() if _keys_differ(value) else shards
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["shards", *map(str, first["loc"])])
        raise UserError(f"{path}: {where}: {first['msg'].lower()}; make the shards again") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: does not say where its shards lie; make it again with `asr-kd index`") from None


def _read_sets(folder: Place, sets: list[dict[str, str]], within: tuple[str, ...]) -> ShardList:
    """The shards of the sets that an index names."""
    found = []
    for one in sets:
        where, known = beside(folder, one["folder"]), one["hash"]
        shards = _read_index(where, within)
        if shards.hash != known:
            raise UserError(
                f"{folder / INDEX}: {where} has changed since (its shards were {known}, now {shards.hash}); run `asr-kd index` again"
            )
        found.append((where, shards))
    return _joined(str(folder / INDEX), found)


def _joined(name: str, sets: list[tuple[str, ShardList]]) -> ShardList:
    joined = ShardList.joined(sets)
    if same := joined.same:
        places = " and ".join(str(info.at("")) for info in same)
        raise UserError(f"{name}: the same shard is there twice, as {places}; leave one of them out")
    return joined


def _origin(folder: Place, about: dict[str, Any]) -> Origin | None:
    """Where the shards of an index lie, by what it says besides; None: beside it. ValueError, KeyError or TypeError when that is wrong."""
    if about.get("version") != ELSEWHERE:
        return None
    reading = about["reading"]
    classes = reading["classes"]
    texts = [*(classes or []), reading["text"] or ""]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("no text")
    return Origin(
        beside(folder, about["folder"]), Reading(reading["text"], None if classes is None else tuple(classes))
    )


def _keys_differ(about: dict[str, Any]) -> bool:
    return about.items() >= {"version": ELSEWHERE, **KEYS_DIFFER}.items()


def beside(folder: Place, name: str) -> str:
    """The folder that an index in `folder` names: a URL, an absolute path, or one that begins at `folder`."""
    if name.startswith("/") or isinstance(place(name), ObjectPath):
        return name
    if isinstance(folder, ObjectPath):
        return str(ObjectPath(folder.protocol, posixpath.normpath(posixpath.join(folder.path, name))))
    return _absolute(str(folder / name))


def _absolute(folder: str) -> str:
    """The same folder for a process that works elsewhere."""
    return folder if isinstance(place(folder), ObjectPath) else os.path.join(os.getcwd(), folder)


def write_index(
    folder: Place | str, infos: Iterable[ShardInfo], origin: Origin | None = None, keys_differ: bool = False
) -> None:
    """Publish the index of a set of shards, a line each; this comes last and makes the set whole.

    Args:
        folder: of the index.
        infos: the shards.
        origin: where they lie, if not beside the index, and how they are read.
        keys_differ: of shards elsewhere, whether somebody saw that no two utterances have the same key.
    """
    about = f'"format": "{FORMAT}", "version": {VERSION if origin is None else ELSEWHERE}, '
    if origin is not None:
        about += f'"folder": {json.dumps(origin.folder)}, "reading": {json.dumps(dataclasses.asdict(origin.reading or Reading()))}, '
        about += f"{json.dumps(KEYS_DIFFER)[1:-1]}, " if keys_differ else ""
    with write_whole(place(folder) / INDEX, "w", make_folder=False) as file:
        file.write(f'{{{about}"shards": [')
        for number, info in enumerate(infos):
            file.write((",\n" if number else "\n") + json.dumps(_row(info)))
        file.write("\n]}\n")


def _row(info: ShardInfo) -> dict[str, Any]:
    row = dataclasses.asdict(info)
    if isinstance(info, ShardElsewhere):
        del row["within"], row["reading"]
        if row["file"] == row["name"]:
            del row["file"]
    return row
