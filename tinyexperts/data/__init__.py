"""Text to training batches: corpora, tokenizer, token shards, loader."""

from tinyexperts.data.corpora import StandardLibraryCorpus, open_corpus
from tinyexperts.data.document import Corpus, Document, printable
from tinyexperts.data.encoded_text import EncodedText
from tinyexperts.data.fetch import FetchedText, download_progress, fetch_text, source_named
from tinyexperts.data.files import FileCorpus
from tinyexperts.data.hub import HubCorpus, HubSource
from tinyexperts.data.loader import Batch, TokenLoader, evaluation_windows
from tinyexperts.data.prepare import PrepareConfig, Summary, prepare
from tinyexperts.data.shards.reader import TokenDataset, TokenSplit
from tinyexperts.data.text_sources import TEXT_SOURCES, TextSource
from tinyexperts.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "TEXT_SOURCES",
    "Batch",
    "Corpus",
    "Document",
    "EncodedText",
    "FetchedText",
    "FileCorpus",
    "HubCorpus",
    "HubSource",
    "PrepareConfig",
    "StandardLibraryCorpus",
    "Summary",
    "TextSource",
    "TokenDataset",
    "TokenLoader",
    "TokenSplit",
    "Tokenizer",
    "download_progress",
    "evaluation_windows",
    "fetch_text",
    "open_corpus",
    "prepare",
    "printable",
    "source_named",
    "train_tokenizer",
]
