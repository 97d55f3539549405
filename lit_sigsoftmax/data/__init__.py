"""Corpora, vocabularies, contiguous streams and the datamodules that feed them to a model."""

from lit_sigsoftmax.data.corpus import Corpus, cache_dir, load_text_corpus, read_tokens
from lit_sigsoftmax.data.datamodule import CorpusDataModule, TextCorpus
from lit_sigsoftmax.data.published import PublishedCorpus
from lit_sigsoftmax.data.streams import IGNORE_INDEX, Segments, eval_streams, shard, train_streams
from lit_sigsoftmax.data.torchtext import from_torchtext
from lit_sigsoftmax.data.vocabulary import EOS, UNK, Vocabulary

__all__ = [
    "EOS",
    "IGNORE_INDEX",
    "UNK",
    "Corpus",
    "CorpusDataModule",
    "PublishedCorpus",
    "Segments",
    "TextCorpus",
    "Vocabulary",
    "cache_dir",
    "eval_streams",
    "from_torchtext",
    "load_text_corpus",
    "read_tokens",
    "shard",
    "train_streams",
]
