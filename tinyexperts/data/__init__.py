"""Text to training batches: corpora, tokenizer, token shards, loader."""

from typing import TYPE_CHECKING

from tinyexperts.extras import require_extra
from tinyexperts.lazy_exports import lazy_exports

require_extra("train", __name__)

from tinyexperts.data.corpora import CORPORA, NamedCorpus, corpus_to_fetch, fetchable_corpora, open_corpus
from tinyexperts.data.document import Corpus, Document, printable
from tinyexperts.data.encoded_text import EncodedText
from tinyexperts.data.evaluation_tasks import fetch_tasks
from tinyexperts.data.fetch import FetchedCorpus, byte_progress, fetch_corpus
from tinyexperts.data.files import FileCorpus
from tinyexperts.data.hub import HubCorpus
from tinyexperts.data.packages import PackageCorpus, PackageFile
from tinyexperts.data.prepare import PrepareConfig, Summary, prepare
from tinyexperts.data.shards.reader import TokenDataset, TokenSplit
from tinyexperts.data.standard_library import StandardLibraryCorpus
from tinyexperts.data.tokenizer import Tokenizer, train_tokenizer

if TYPE_CHECKING:  # needs torch
    from tinyexperts.data.loader import Batch, TokenLoader, evaluation_windows
else:
    __getattr__, __dir__ = lazy_exports(__name__, __file__)

__all__ = [
    "CORPORA",
    "Batch",
    "Corpus",
    "Document",
    "EncodedText",
    "FetchedCorpus",
    "FileCorpus",
    "HubCorpus",
    "NamedCorpus",
    "PackageCorpus",
    "PackageFile",
    "PrepareConfig",
    "StandardLibraryCorpus",
    "Summary",
    "TokenDataset",
    "TokenLoader",
    "TokenSplit",
    "Tokenizer",
    "byte_progress",
    "corpus_to_fetch",
    "evaluation_windows",
    "fetch_corpus",
    "fetch_tasks",
    "fetchable_corpora",
    "open_corpus",
    "prepare",
    "printable",
    "train_tokenizer",
]
