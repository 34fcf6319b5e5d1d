from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ALONE = """
import sys
from asr_kd.shards.tarset import Sample, read_shard, write_shard
write_shard("a.tar", [Sample("a", b"sound", "flac", {})])
assert [sample.key for sample in read_shard("a.tar")] == ["a"]
assert not {"torch", "webdataset"} & sys.modules.keys()
import torch.utils.data, webdataset
assert issubclass(webdataset.DataPipeline, torch.utils.data.IterableDataset)
"""


def test_shards_are_written_and_read_without_torch_and_others_get_a_whole_webdataset(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)
