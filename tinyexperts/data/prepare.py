"""From text to a token data set: read, split by document, train the tokenizer on the training part, encode."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from tinyexperts.data.corpora import STANDARD_LIBRARY, open_corpus
from tinyexperts.data.document import Corpus, printable
from tinyexperts.data.facts.fact_set import FACTS_FILE, FactSet, read_fact_set
from tinyexperts.data.facts.phrasings import airport_phrasings, default_phrasings, read_phrasings
from tinyexperts.data.facts.statements import FactStatements
from tinyexperts.data.facts.table import AIRPORTS, airports, read_fact_table
from tinyexperts.data.fetch import byte_progress
from tinyexperts.data.files import FileCorpus, paths_of, skipped_note
from tinyexperts.data.folders import walk_folders
from tinyexperts.data.shards.index import TOKENIZER_FILE, DatasetIndex, SplitName, SplitRecord
from tinyexperts.data.shards.writer import SplitWriter, folder_written_whole, token_type
from tinyexperts.data.spool import DocumentSpool, SplitDocuments
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
    """stdlib (the default: this Python's standard library), airports (facts about 7,884 airports), a name that
    `tinyexperts data fetch` lists, or any Hugging Face data set as owner/name."""
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
    facts: Path | None = None
    """Table of facts to take in place of a corpus, a .csv or .tsv with an entity in each row: every fact becomes a
    statement in each of several phrasings."""
    key: str | None = None
    """Column of the table that names the entities."""
    attributes: tuple[str, ...] = ()
    """Columns of the table, or attributes of the airports, that are facts; without it all but the key."""
    phrasings: Path | None = None
    """TOML file with a list of phrasings for an attribute, or for "*", all others; each has {key}, then {value}, and
    may have {attribute}. The last of a list is never trained on. Or a data set of facts, to take its phrasings. Without
    it there are phrasings for any column, and others for the airports."""
    every_fact: bool = False
    """Train on every fact in all phrasings but the last, and hold out that one of each: facts to teach a model."""
    max_entities: int | None = None
    """Take this many entities, drawn by the seed."""
    exclude: tuple[Path, ...] = ()
    """Data sets of facts whose entities are left out: for entities that a model has never seen."""
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
        self._check_facts()
        for name in ("hub_config", "hub_split"):
            if self.files and getattr(self, name) is not None:
                raise InputError(f"{name} is for Hugging Face data sets, and files were given: {getattr(self, name)!r}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise InputError(
                f"vocab_size is for a tokenizer that is trained, and {printable(self.tokenizer)} exists already"
            )
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be above 0 and below 1, got {self.validation_fraction}")
        for name in ("max_documents", "max_bytes", "max_entities"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be positive, got {value}")

    def _check_facts(self) -> None:
        table_settings = ("key",) if self.corpus == AIRPORTS else ("key", "attributes", "phrasings")
        given = [name for name in table_settings if getattr(self, name)]
        if self.facts is None and given:
            raise InputError(f"{given[0]} is for a table of facts, and none was given: {getattr(self, given[0])}")
        if len(set(self.attributes)) < len(self.attributes):
            raise InputError(f"attributes must be different, got {', '.join(self.attributes)}")
        if self.facts is not None and (self.files or self.corpus is not None):
            raise InputError(f"give one of a corpus, files and facts, got facts {printable(self.facts)} and another")
        if self.facts is not None and self.key is None:
            raise InputError(f"key must be the column of {printable(self.facts)} that names the entities, got none")
        if self.is_of_facts:
            for name in ("text_field", "hub_config", "hub_split", "max_documents", "max_bytes"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(f"{name} is for texts, and facts have max_entities, got {value}")
        elif self.every_fact or self.exclude:
            raise InputError(f"{'every_fact' if self.every_fact else 'exclude'} is for facts, and there are none")
        elif self.max_entities is not None:
            raise InputError(f"max_entities is for facts, and there are none, got {self.max_entities}")

    @property
    def is_of_facts(self) -> bool:
        """True if the text is made of facts."""
        return self.facts is not None or self.corpus == AIRPORTS

    def output_folder(self) -> Path:
        """Return the folder that was asked for, or data/ and the name of the corpus."""
        if self.output is not None:
            return self.output
        if self.facts is not None:
            return Path("data", self.facts.resolve().name.partition(".")[0])
        if self.files:
            return Path("data", self.files[0].resolve().name)
        return Path("data", (self.corpus or STANDARD_LIBRARY).replace("/", "--"))

    def open_facts(self) -> FactStatements:
        """Return the statements of the facts that were asked for.

        Raises:
            InputError: a table or phrasings that can't be read, or that break their rules.
        """
        if self.facts is not None and self.key is not None:
            table = read_fact_table(self.facts, key=self.key, attributes=self.attributes)
            phrasings = {attribute: default_phrasings(attribute) for attribute in table.attributes}
        else:
            table = airports(self.attributes)
            phrasings = airport_phrasings(table.attributes)
        if self.phrasings is not None and self.phrasings.is_dir():
            phrasings = read_fact_set(self.phrasings / FACTS_FILE).phrasings_for(table.attributes)
        elif self.phrasings is not None:
            phrasings = read_phrasings(self.phrasings, table.attributes)
        for folder in self.exclude:
            table = table.without(read_fact_set(folder / FACTS_FILE).entities)
        if self.max_entities is not None:
            table = table.sample(self.max_entities, seed=self.seed)
        fraction = None if self.every_fact else self.validation_fraction
        return FactStatements(table, phrasings, seed=self.seed, held_out_fraction=fraction)

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
    facts: FactSet | None = field(default=None, repr=False)
    """The facts of a data set of facts."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, over both splits."""
        records = self.index.splits.values()
        return sum(record.num_bytes for record in records) / sum(record.num_tokens for record in records)

    def __str__(self) -> str:
        index, records = self.index, self.index.splits.values()
        lines = [f"{printable(self.folder)}: vocabulary {index.vocab_size:,}, {self.bytes_per_token:.2f} bytes a token"]
        width = max(map(len, index.splits))
        for name, record in index.splits.items():
            lines.append(
                f"  {name:<{width}} {record.num_documents:>9,} documents  {record.num_tokens:>13,} tokens"
                f"  {record.num_bytes:>14,} bytes"
            )
        if self.facts is not None:
            lines.append(f"  {self.facts}")
            return "\n".join(lines)
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
    source = config.open_facts() if config.is_of_facts else config.open_corpus()
    skipped: list[str] = []
    output = config.output_folder()
    _check_not_in_input(output, config.files)
    with folder_written_whole(output) as folder, byte_progress() as progress:
        tokenizer = _existing_tokenizer(config)
        documents = (
            source
            if isinstance(source, FactStatements)
            else _read(source, config, folder / "documents.spool", skipped, progress)
        )
        if tokenizer is None:
            texts = (text for split, text in _watched(documents, progress, "training") if split == "train")
            tokenizer = train_tokenizer(texts, config.vocab_size or DEFAULT_VOCAB_SIZE)
        splits = _encode(documents, tokenizer, folder, progress)
        facts = None
        if isinstance(documents, DocumentSpool):
            documents.remove()
        else:
            facts = documents.facts.write(folder)
            answers = documents.write(folder, tokenizer)
            splits = {name: record.model_copy(update={"facts": answers[name]}) for name, record in splits.items()}
        tokenizer.save(folder / TOKENIZER_FILE)
        index = DatasetIndex(
            tokenizer_sha256=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            dtype=token_type(tokenizer.vocab_size),
            corpus=source.description(),
            seed=config.seed,
            validation_fraction=config.validation_fraction,
            num_duplicates_removed=documents.num_duplicates,
            num_empty_removed=documents.num_empty,
            num_files_skipped=len(skipped),
            splits=splits,
            facts=facts,
        )
        index.write(folder)
    fact_set = source.facts if isinstance(source, FactStatements) else None
    return Summary(folder=output, index=index, skipped=tuple(skipped), facts=fact_set)


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
    spool.hold_out(config.validation_fraction)
    return spool


def _watched(documents: SplitDocuments, progress: Progress, description: str) -> Iterator[tuple[SplitName, str]]:
    task = progress.add_task(description, total=documents.num_bytes)
    for split, text in documents.texts():
        yield split, text
        progress.advance(task, len(text.encode()))


def _encode(
    documents: SplitDocuments, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> dict[SplitName, SplitRecord]:
    sizes = {"vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id}
    writers: dict[SplitName, SplitWriter] = {name: SplitWriter(folder, name, **sizes) for name in documents.split_names}
    try:
        for splits, texts in _batches(_watched(documents, progress, "encoding")):
            encoded = tokenizer.encode_batch(texts)
            losses = tokenizer.loses_text(texts, encoded)
            for split, text, ids, is_lossy in zip(splits, texts, encoded, losses, strict=True):
                writers[split].write(ids, len(text.encode()), is_lossy=is_lossy)
        return {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _batches(documents: Iterator[tuple[SplitName, str]]) -> Iterator[tuple[list[SplitName], list[str]]]:
    """Gather documents until they have about a megabyte, which keeps all cores busy and little in memory."""
    splits: list[SplitName] = []
    texts: list[str] = []
    num_characters = 0
    for split, text in documents:
        splits.append(split)
        texts.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_BYTES:
            yield splits, texts
            splits, texts, num_characters = [], [], 0
    if texts:
        yield splits, texts
