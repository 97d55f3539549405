"""PublishedCorpus: a corpus of the literature, found in a folder or downloaded, and held against its published size."""

import os
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lit_sigsoftmax.data.corpus import SPLITS, Corpus, cache_dir, load_text_corpus
from lit_sigsoftmax.data.datamodule import CorpusDataModule

__all__ = ["DATA_VARIABLE", "PublishedCorpus"]

DATA_VARIABLE = "LIT_SIGSOFTMAX_DATA"


class PublishedCorpus(CorpusDataModule):
    """Base of the datamodules of published corpora: subclasses give the facts below and :meth:`fetch`.

    Args:
        root: A folder that holds the corpus's files, itself or in the sub-folder of their archive. By default
            ``$LIT_SIGSOFTMAX_DATA``; if that is not set either, the files are downloaded into the cache.
        **streams: The arguments of :class:`~lit_sigsoftmax.data.CorpusDataModule`.
    """

    corpus_name: ClassVar[str]
    """What reports and tracking call the corpus; also its folder in the cache."""
    folder: ClassVar[str]
    """The sub-folder that the published archive puts the files in."""
    file_name: ClassVar[str]
    """The name of each file, with ``{split}`` for train, valid or test."""
    n_tokens: ClassVar[tuple[int, int, int]]
    """Published number of tokens of train, valid and test, one ``<eos>`` a line included."""
    n_types: ClassVar[int]
    """Published size of the vocabulary, ``<eos>`` included."""

    def __init__(self, root: str | None = None, **streams: int) -> None:
        super().__init__(**streams)
        self.root = root

    @abstractmethod
    def fetch(self, folder: Path) -> None:
        """Download the three files into ``folder``, where they are still missing."""

    def load_corpus(self) -> Corpus:
        """Find or download the files, encode them, and warn if their size is not the published one.

        Raises:
            FileNotFoundError: If a folder was named that lacks a file.
            DownloadError: If none was named and the files cannot be downloaded.
        """
        corpus = load_text_corpus(self.corpus_name, self._find())
        things = [*(f"{split} tokens" for split in SPLITS), "types"]
        found = [*(len(getattr(corpus, split)) for split in SPLITS), len(corpus.vocabulary)]
        rows = zip(things, found, [*self.n_tokens, self.n_types], strict=True)
        differences = [f"{have:,} {thing} (published: {want:,})" for thing, have, want in rows if have != want]
        if differences:
            rank_zero_warn(
                f"this {self.corpus_name} is not the published corpus: it has {', '.join(differences)}. "
                "Perplexities on it cannot be compared with published ones."
            )
        return corpus

    def paths(self, folder: Path) -> dict[str, Path]:
        """The file of each split in ``folder``."""
        return {split: folder / self.file_name.format(split=split) for split in SPLITS}

    def _find(self) -> dict[str, Path]:
        root = self.root or os.environ.get(DATA_VARIABLE)
        if not root:
            downloaded = cache_dir() / self.corpus_name
            paths = self.paths(downloaded)
            if not all(path.is_file() for path in paths.values()):
                self.fetch(downloaded)
            return paths
        folders = [Path(root).expanduser(), Path(root).expanduser() / self.folder]
        for folder in folders:
            paths = self.paths(folder)
            if all(path.is_file() for path in paths.values()):
                return paths
        names = ", ".join(path.name for path in paths.values())
        raise FileNotFoundError(
            f"{self.corpus_name}: {names} are neither all in {folders[0]} nor in {folders[1]}, as "
            f"{'data.root' if self.root else DATA_VARIABLE} says. Point data.root at the folder that holds them; "
            f"without data.root and {DATA_VARIABLE} they are downloaded."
        )
