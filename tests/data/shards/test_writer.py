from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tinyexperts.data.shards.writer import SplitWriter, folder_written_whole, token_type
from tinyexperts.errors import InputError


def test_documents_run_on_over_shards_and_the_record_says_what_is_there(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", vocab_size=100, end_of_text_id=9, max_tokens_per_shard=4)
    for ids, num_bytes in (([1, 2], 20), ([], 0), ([3, 4, 5, 6, 7, 8, 1], 70), ([2], 5)):
        writer.write(ids, num_bytes)
    record = writer.finish()
    shards = [np.fromfile(tmp_path / shard.file, dtype="<u2") for shard in record.shards]
    assert [shard.tolist() for shard in shards] == [[1, 2, 9, 9], [3, 4, 5, 6], [7, 8, 1, 9], [2, 9]]
    assert [shard.file for shard in record.shards] == [f"train-0000{i}.bin" for i in range(4)]
    assert [shard.num_tokens for shard in record.shards] == [4, 4, 4, 2]
    for shard in record.shards:
        assert shard.sha256 == hashlib.sha256((tmp_path / shard.file).read_bytes()).hexdigest()
    assert (record.num_documents, record.num_tokens, record.num_bytes) == (4, 14, 95)
    documents = np.load(tmp_path / record.documents_file)
    assert documents.dtype == np.int64
    assert documents.tolist() == [[0, 20], [3, 0], [4, 70], [12, 5]]
    assert record.documents_sha256 == hashlib.sha256((tmp_path / record.documents_file).read_bytes()).hexdigest()


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_ids_get_the_smallest_type_that_holds_them(tmp_path: Path, vocab_size: int) -> None:
    assert token_type(vocab_size) == ("uint16" if vocab_size == 65_536 else "uint32")
    writer = SplitWriter(tmp_path, "validation", vocab_size=vocab_size, end_of_text_id=0)
    writer.write([vocab_size - 1, 1], 3)
    record = writer.finish()
    tokens = np.fromfile(tmp_path / record.shards[0].file, dtype=np.dtype(token_type(vocab_size)).newbyteorder("<"))
    assert tokens.tolist() == [vocab_size - 1, 1, 0]


def test_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "set"
    with folder_written_whole(output) as folder:
        (folder / "file").write_text("content")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["file"]
    assert [path.name for path in output.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, InputError, RuntimeError])
def test_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    def write() -> None:
        with folder_written_whole(tmp_path / "set") as folder:
            (folder / "file").write_text("content")
            raise failure("stop")

    with pytest.raises(failure, match="stop"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_system_failure_is_one_sentence(tmp_path: Path) -> None:
    def write() -> None:
        with folder_written_whole(tmp_path / "set"):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*set, nothing of it is kept: No space left on device"):
        write()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"), folder_written_whole(tmp_path / "file" / "set"):
        pass


def test_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    with pytest.raises(InputError, match="set exists; choose another name or delete it"):
        folder_written_whole(tmp_path / "set").__enter__()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").write_text("x")
    with pytest.raises(InputError, match=r"other\.partial is in the way"):
        folder_written_whole(tmp_path / "other").__enter__()
    assert (tmp_path / "set" / "mine").exists()
    assert (tmp_path / "other.partial" / "mine").exists()


def test_left_over_of_a_killed_process_is_replaced_but_not_that_of_a_living_one(tmp_path: Path) -> None:
    partial = tmp_path / "set.partial"
    partial.mkdir()
    (partial / "lock").write_text("")
    (partial / "train-00007.bin").write_text("half")
    with FileLock(partial / "lock"), pytest.raises(InputError, match="another process is writing"):
        folder_written_whole(tmp_path / "set").__enter__()
    assert (partial / "train-00007.bin").exists()
    with folder_written_whole(tmp_path / "set") as folder:
        (folder / "file").write_text("content")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["file"]
