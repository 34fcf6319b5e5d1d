"""Models on the Hugging Face hub, through its cache on this machine."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from asr_kd.errors import UserError
from asr_kd.models.outside.tokens import language_of

#: how a model on the hub is named
HUB = "hf:"
NAME = re.compile(r"hf:(?P<model>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
#: files that are fetched: nothing that could hold a pickle or code (model.bin is CTranslate2's own format)
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "model.bin")
#: weights of single languages, of which MMS has a thousand beside those of all
ADAPTERS = "adapter.*"


def fetched(name: str) -> Path:
    """The folder of a model `hf:owner/name@revision`, fetched unless the cache has it; UserError when that fails.

    Of a model of many languages (MMS) the weights of one are fetched: that which its files choose (`language_of`).
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise UserError(f"{name}: is not quite a model of the hub; write hf:owner/name or hf:owner/name@revision")
    folder = _snapshot(name, found["model"], found["revision"], list(FILES), [ADAPTERS])
    if language := language_of(folder):
        # the same commit, which the folder is named by: a branch may have moved meanwhile
        _snapshot(name, found["model"], folder.name, [f"adapter.{glob.escape(language)}.safetensors"], [])
    return folder


def _snapshot(name: str, model: str, revision: str | None, wanted: list[str], left: list[str]) -> Path:
    """The folder of a model in the cache with the files that some patterns name and others do not; a UserError as of `fetched`."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UserError("teacher: huggingface-hub is not installed; run `pip install 'asr-kd[hf]'`") from None
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=left))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name}: is not in the cache of this machine, and the hub cannot be reached; fetch it where there is a network, and give its folder"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{name}: cannot be fetched ({reason}); check its name, and that you may read it") from None
