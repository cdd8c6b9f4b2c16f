"""From text to a token data set: read, split by document, train the tokenizer on the training part, encode."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from tinyexperts.data.corpora import STANDARD_LIBRARY, open_corpus
from tinyexperts.data.document import Corpus, printable
from tinyexperts.data.fetch import byte_progress
from tinyexperts.data.files import FileCorpus, paths_of, skipped_note
from tinyexperts.data.folders import walk_folders
from tinyexperts.data.shards.index import TOKENIZER_FILE, DatasetIndex, SplitName, SplitRecord
from tinyexperts.data.shards.writer import SplitWriter, folder_written_whole, token_type
from tinyexperts.data.spool import DocumentSpool
from tinyexperts.data.tokenizer import Tokenizer, text_loss, train_tokenizer
from tinyexperts.errors import InputError

DEFAULT_VOCAB_SIZE = 4096
_BATCH_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The text to take, and the way to split and to encode it."""

    output: Path | None = None
    """Folder of the data set, which must not exist; without it data/ and the name of the corpus."""
    corpus: str | None = None
    """stdlib (the default: this Python's standard library), a name that `tinyexperts data fetch` lists, or any Hugging
    Face data set as owner/name."""
    files: tuple[Path, ...] = ()
    """Files and folders to take in place of a corpus: text and source code of any kind, .jsonl (.ndjson, .json), .csv,
    .parquet; also as .gz, .bz2, .xz."""
    text_field: str | None = None
    """Field or column with the text in .jsonl, .json, .csv, .parquet, Hugging Face data sets; without it what is known,
    or text."""
    hub_config: str | None = None
    """Configuration of the Hugging Face data set, for example en."""
    hub_split: str | None = None
    """Split of the Hugging Face data set to read; without it train, or what is known."""
    tokenizer: str | None = None
    """Existing tokenizer: a tokenizer.json, GPT-2's gpt2.tiktoken, or gpt2 to fetch it; without it one is trained."""
    vocab_size: int | None = None
    """Vocabulary of the byte-level BPE that is trained; without it 4096."""
    validation_fraction: float = 0.05
    """Share of the documents that are held out."""
    seed: int = 0
    """Decides which documents are held out."""
    max_documents: int | None = None
    """Stop after this many distinct documents."""
    max_bytes: int | None = None
    """Stop before the document that would make the text longer than this."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", paths_of(self.files))
        if self.output is not None:
            object.__setattr__(self, "output", Path(self.output))
        if self.files and self.corpus is not None:
            raise InputError(f"give either a corpus or files, got corpus {self.corpus!r} and {len(self.files)} files")
        for name in ("hub_config", "hub_split"):
            if self.files and getattr(self, name) is not None:
                raise InputError(f"{name} is for Hugging Face data sets, and files were given: {getattr(self, name)!r}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise InputError(
                f"vocab_size is for a tokenizer that is trained, and {printable(self.tokenizer)} exists already"
            )
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be above 0 and below 1, got {self.validation_fraction}")
        for name in ("max_documents", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be positive, got {value}")

    def output_folder(self) -> Path:
        """Return the folder that was asked for, or data/ and the name of the corpus."""
        if self.output is not None:
            return self.output
        if self.files:
            return Path("data", self.files[0].resolve().name)
        return Path("data", (self.corpus or STANDARD_LIBRARY).replace("/", "--"))

    def open_corpus(self) -> Corpus:
        """Return the corpus that was asked for.

        Raises:
            InputError: an unknown name, or a missing file.
        """
        if self.files:
            return FileCorpus(self.files, text_field=self.text_field or "text")
        return open_corpus(
            self.corpus or STANDARD_LIBRARY,
            text_field=self.text_field,
            hub_config=self.hub_config,
            hub_split=self.hub_split,
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a preparation."""

    folder: Path
    index: DatasetIndex
    skipped: tuple[str, ...] = field(repr=False)
    """One sentence for each file that was left out."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, over both splits."""
        records = self.index.splits.values()
        return sum(record.num_bytes for record in records) / sum(record.num_tokens for record in records)

    def __str__(self) -> str:
        index, records = self.index, self.index.splits.values()
        lines = [f"{printable(self.folder)}: vocabulary {index.vocab_size:,}, {self.bytes_per_token:.2f} bytes a token"]
        for name, record in index.splits.items():
            lines.append(
                f"  {name:<10} {record.num_documents:>9,} documents  {record.num_tokens:>13,} tokens"
                f"  {record.num_bytes:>14,} bytes"
            )
        lines.append(
            f"  left out: {index.num_duplicates_removed:,} duplicates, {index.num_empty_removed:,} empty documents, "
            f"{len(self.skipped):,} files" + (f" (the first: {self.skipped[0]})" if self.skipped else "")
        )
        if num_lossy := sum(record.num_lossy_documents or 0 for record in records):
            lines.append(f"  {text_loss(num_lossy, sum(record.num_documents for record in records))}")
        return "\n".join(lines)


def prepare(config: PrepareConfig) -> Summary:
    """Make a token data set; it appears as a whole or, if anything fails, not at all.

    Exact duplicates (up to white space) are removed before the split, so that no document is in both parts, and the
    tokenizer is trained on the training part alone. The same text, seed and sizes give the same bytes.

    Args:
        config (PrepareConfig): the text, and the way to split and to encode it.

    Returns:
        A summary, whose text is what `tinyexperts data prepare` prints.

    Raises:
        InputError: text that cannot be read, no text, a split that would be empty, a vocabulary larger than the text
            supports, a folder that exists, a full disk.
    """
    corpus = config.open_corpus()
    skipped: list[str] = []
    output = config.output_folder()
    _check_not_in_input(output, config.files)
    with folder_written_whole(output) as folder, byte_progress() as progress:
        tokenizer = _existing_tokenizer(config)
        spool = _read(corpus, config, folder / "documents.spool", skipped, progress)
        validation = spool.validation_documents(config.validation_fraction)
        if tokenizer is None:
            texts = (text for number, text in _watched(spool, progress, "training") if number not in validation)
            tokenizer = train_tokenizer(texts, config.vocab_size or DEFAULT_VOCAB_SIZE)
        splits = _encode(spool, validation, tokenizer, folder, progress)
        spool.remove()
        tokenizer.save(folder / TOKENIZER_FILE)
        index = DatasetIndex(
            tokenizer_sha256=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            dtype=token_type(tokenizer.vocab_size),
            corpus=corpus.description(),
            seed=config.seed,
            validation_fraction=config.validation_fraction,
            num_duplicates_removed=spool.num_duplicates,
            num_empty_removed=spool.num_empty,
            num_files_skipped=len(skipped),
            splits=splits,
        )
        index.write(folder)
    return Summary(folder=output, index=index, skipped=tuple(skipped))


def _check_not_in_input(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an input that would hold the output, in itself or in a folder that one of its links leads to."""
    above = [parent.stat() for parent in output.resolve().parents if parent.exists()]
    for folder in filter(Path.is_dir, inputs):
        for reached, _ in walk_folders(folder):
            found = reached.stat()
            if any(os.path.samestat(found, parent) for parent in above):
                raise InputError(
                    f"the output {printable(output)} is inside the input {printable(reached)}, which would then hold "
                    "its own tokens: choose an --output elsewhere"
                )


def _existing_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    if config.tokenizer == "gpt2" and not os.path.exists("gpt2"):
        return Tokenizer.from_hub("gpt2")
    return Tokenizer.load(Path(config.tokenizer))


def _read(corpus: Corpus, config: PrepareConfig, path: Path, skipped: list[str], progress: Progress) -> DocumentSpool:
    """Read the corpus to disk, up to the limits."""
    spool = DocumentSpool(path, seed=config.seed)
    task = progress.add_task("reading", total=config.max_bytes)
    try:
        for document in corpus.documents(skipped):
            num_bytes = len(document.text.encode())
            if config.max_bytes is not None and spool.num_bytes + num_bytes > config.max_bytes:
                break
            spool.add(document.text)
            progress.update(task, completed=spool.num_bytes)
            if config.max_documents is not None and len(spool) == config.max_documents:
                break
    finally:
        spool.finish()
    progress.update(task, total=spool.num_bytes)
    if not len(spool):
        source = ", ".join(f"{key} {value}" for key, value in corpus.description().items() if value)
        limit = "" if config.max_bytes is None else f" within max_bytes {config.max_bytes}"
        raise InputError(f"the corpus has no text{limit} ({source})" + skipped_note(skipped))
    return spool


def _watched(spool: DocumentSpool, progress: Progress, description: str) -> Iterator[tuple[int, str]]:
    task = progress.add_task(description, total=spool.num_bytes)
    for number, text in spool.texts():
        yield number, text
        progress.advance(task, len(text.encode()))


def _encode(
    spool: DocumentSpool, validation: frozenset[int], tokenizer: Tokenizer, folder: Path, progress: Progress
) -> dict[SplitName, SplitRecord]:
    sizes = {"vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id}
    writers: dict[SplitName, SplitWriter] = {
        "train": SplitWriter(folder, "train", **sizes),
        "validation": SplitWriter(folder, "validation", **sizes),
    }
    try:
        for numbers, texts in _batches(_watched(spool, progress, "encoding")):
            encoded = tokenizer.encode_batch(texts)
            losses = tokenizer.loses_text(texts, encoded)
            for number, text, ids, is_lossy in zip(numbers, texts, encoded, losses, strict=True):
                writer = writers["validation" if number in validation else "train"]
                writer.write(ids, len(text.encode()), is_lossy=is_lossy)
        return {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Gather documents until they have about a megabyte, which keeps all cores busy and little in memory."""
    numbers: list[int] = []
    texts: list[str] = []
    num_characters = 0
    for number, text in documents:
        numbers.append(number)
        texts.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_BYTES:
            yield numbers, texts
            numbers, texts, num_characters = [], [], 0
    if texts:
        yield numbers, texts
