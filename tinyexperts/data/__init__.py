"""Text to training batches: corpora, tokenizer, token shards, loader."""

from tinyexperts.data.corpora import StandardLibraryCorpus, open_corpus
from tinyexperts.data.document import Corpus, Document
from tinyexperts.data.encoded_text import EncodedText
from tinyexperts.data.files import FileCorpus
from tinyexperts.data.hub import HubCorpus, HubSource
from tinyexperts.data.loader import Batch, TokenLoader, evaluation_windows
from tinyexperts.data.prepare import PrepareConfig, Summary, prepare
from tinyexperts.data.token_shards import TokenDataset, TokenSplit
from tinyexperts.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "EncodedText",
    "FileCorpus",
    "HubCorpus",
    "HubSource",
    "PrepareConfig",
    "StandardLibraryCorpus",
    "Summary",
    "TokenDataset",
    "TokenLoader",
    "TokenSplit",
    "Tokenizer",
    "evaluation_windows",
    "open_corpus",
    "prepare",
    "train_tokenizer",
]
