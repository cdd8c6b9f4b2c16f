from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tinyexperts.data import TokenDataset, Tokenizer, train_tokenizer
from tinyexperts.data.shards.reader import ShardedTokens
from tinyexperts.errors import InputError


@pytest.fixture
def copy(small_dataset: TokenDataset, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(small_dataset.folder, tmp_path / "copy"))


def test_slices_run_over_shards() -> None:
    whole = np.arange(10, dtype=np.int64)
    tokens = ShardedTokens([shard.astype("<u2") for shard in (whole[:4], whole[4:5], whole[5:])])
    assert len(tokens) == 10
    for start in range(-11, 12):
        for stop in range(-11, 12):
            ids = tokens[start:stop]
            assert ids.dtype == np.int64
            assert ids.tolist() == whole[start:stop].tolist()
    assert tokens[:].tolist() == whole.tolist()
    with pytest.raises(ValueError, match="steps of 1, got 2"):
        tokens[::2]


def test_documents_table_gives_each_document_back(small_dataset: TokenDataset, small_corpus: Path) -> None:
    expected = {path.read_text() for path in small_corpus.iterdir()}
    found = []
    for name in ("train", "validation"):
        split = small_dataset.split(name)
        texts = []
        for number in range(split.num_documents):
            ids = split.document(number)
            assert ids[-1] == small_dataset.tokenizer.end_of_text_id
            texts.append(small_dataset.tokenizer.decode(ids[:-1]))
            assert split.documents[number, 1] == len(texts[-1].encode())
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_tokens == len(split.tokens) == sum(len(split.document(i)) for i in range(split.num_documents))
        assert split.document(-1).tolist() == split.document(split.num_documents - 1).tolist()
        found += texts
    assert len(found) == len(expected) == 40
    assert set(found) == expected


def test_tokens_are_mapped_and_not_read(small_dataset: TokenDataset) -> None:
    assert all(isinstance(shard, np.memmap) for shard in small_dataset.split("train").tokens._shards)


def test_unknown_split_is_refused(small_dataset: TokenDataset) -> None:
    with pytest.raises(InputError, match="has the splits train, validation, got 'test'"):
        small_dataset.split("test")  # type: ignore[arg-type]


def test_a_missing_folder_and_a_folder_without_index_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such data set: .*nowhere"):
        TokenDataset.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not a data set: it has no index\.json"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this program reads version 1"),
        ({"version": None}, "has version None"),
        ({"format": "other"}, "is not the index of a data set"),
        ({"vocab_size": "many"}, r"is damaged: vocab_size: "),
        ({"surprise": 1}, r"is damaged: surprise: "),
        ({"splits": {}}, "is damaged: it has no split train"),
    ],
)
def test_index_that_does_not_fit_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(InputError, match=message):
        TokenDataset.open(copy)


@pytest.mark.parametrize("content", ['{"format": "tinyex', "[]", "\udcff"])
def test_damaged_index_is_refused(copy: Path, content: str) -> None:
    (copy / "index.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"index\.json is (damaged|not the index)"):
        TokenDataset.open(copy)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_shard_is_found_at_opening(copy: Path, verify: bool) -> None:
    shard = copy / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(
        InputError, match=rf"train-00000\.bin is truncated: it has {len(content) - 2} bytes, .*{len(content)}"
    ):
        TokenDataset.open(copy, verify=verify)
    shard.write_bytes(content + b"\0\0")
    with pytest.raises(InputError, match=r"train-00000\.bin is too long"):
        TokenDataset.open(copy, verify=verify)
    shard.unlink()
    with pytest.raises(InputError, match=r"incomplete: .*train-00000\.bin is missing"):
        TokenDataset.open(copy, verify=verify)


@pytest.mark.parametrize("file", ["train-00000.bin", "validation-00000.bin", "validation-documents.npy"])
def test_one_changed_bit_is_found_by_the_checksum(copy: Path, file: str) -> None:
    content = bytearray((copy / file).read_bytes())
    content[-3] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{file} is corrupt"):
        TokenDataset.open(copy)
    dataset = TokenDataset.open(copy, verify=False)
    with pytest.raises(InputError, match=rf"{file} is corrupt"):
        dataset.verify()


def test_document_table_that_does_not_fit_is_refused(copy: Path) -> None:
    path = copy / "train-documents.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(InputError, match=r"train-documents\.npy is truncated or corrupt"):
        TokenDataset.open(copy, verify=False)
    np.save(path, np.zeros((3, 2), dtype=np.int64))
    with pytest.raises(InputError, match=r"must be int64 \[36, 2\], got"):
        TokenDataset.open(copy, verify=False)
    path.unlink()
    with pytest.raises(InputError, match=r"train-documents\.npy is missing"):
        TokenDataset.open(copy, verify=False)


def test_tokens_of_another_tokenizer_are_refused(copy: Path) -> None:
    train_tokenizer([path.name * 3 for path in copy.iterdir()], 258).save(copy / "tokenizer.json")
    with pytest.raises(
        InputError, match=r"made by another tokenizer than its tokenizer\.json: sha256 \w{12} in the index"
    ):
        TokenDataset.open(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        TokenDataset.open(copy)


def without_the_count_of_losses(folder: Path) -> Path:
    """Rewrite an index as it was before it counted what the tokenizer loses."""
    index = json.loads((folder / "index.json").read_text())
    for record in index["splits"].values():
        del record["num_lossy_documents"]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_an_older_data_set_opens_as_the_same_one(copy: Path, small_dataset: TokenDataset) -> None:
    old = TokenDataset.open(without_the_count_of_losses(copy))
    assert old.sha256 == small_dataset.sha256
    for name in ("train", "validation"):
        assert old.index.splits[name].num_lossy_documents is None
        assert small_dataset.index.splits[name].num_lossy_documents == 0
        assert old.split(name).num_bytes == small_dataset.split(name).num_bytes
        assert old.split(name).text_loss is small_dataset.split(name).text_loss is None


def test_an_older_data_set_of_a_tokenizer_that_may_lose_text_has_unknown_bytes(copy: Path) -> None:
    folder = without_the_count_of_losses(copy)
    tokenizer = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    index = json.loads((folder / "index.json").read_text())
    index["tokenizer_sha256"] = Tokenizer.load(folder / "tokenizer.json").hash
    (folder / "index.json").write_text(json.dumps(index))
    split = TokenDataset.open(folder).split("train")
    assert split.num_bytes is None
    assert split.text_loss is not None
    assert "is not recorded; prepare the data set again" in split.text_loss


def test_the_identity_of_a_data_set_does_not_hang_on_what_follows_from_it(small_dataset: TokenDataset) -> None:
    splits = {}
    for name, record in sorted(small_dataset.index.splits.items()):
        splits[name] = {
            "shards": [shard.model_dump() for shard in record.shards],
            "documents_file": record.documents_file,
            "documents_sha256": record.documents_sha256,
            "num_documents": record.num_documents,
            "num_tokens": record.num_tokens,
            "num_bytes": record.num_bytes,
        }
    expected = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert small_dataset.sha256 == expected
