"""WikiText-2 as published by Merity et al. (2016): the word-level version, with ``<unk>`` and 33,278 types."""

from pathlib import Path

from lit_sigsoftmax.data import PublishedCorpus
from lit_sigsoftmax.data.download import download, extract_member

__all__ = ["WikiText2"]

# The original address (the metamind bucket) has been closed since 2024. These hold the same file: the first author's
# own copy, the one of MXNet's datasets, and the Internet Archive's capture of the original.
_SOURCES = (
    "https://wikitext.smerity.com/wikitext-2-v1.zip",
    "https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/gluon/dataset/wikitext-2/wikitext-2-v1.zip",
    "https://web.archive.org/web/2023id_/https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
)
# MD5 542ccefacc6c27f945fb54453812b3cd in torchtext
_SHA256 = "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"


class WikiText2(PublishedCorpus):
    """WikiText-2: ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens``.

    Args:
        root: A folder that holds the three files, itself or in its sub-folder ``wikitext-2``. By default
            ``$LIT_SIGSOFTMAX_DATA``; if that is not set either, the archive is downloaded into the cache (4.5 MB).
        **streams: The arguments of :class:`~lit_sigsoftmax.data.CorpusDataModule`.
    """

    corpus_name = "wikitext2"
    folder = "wikitext-2"
    file_name = "wiki.{split}.tokens"
    n_tokens = (2_088_628, 217_646, 245_569)
    n_types = 33_278

    def fetch(self, folder: Path) -> None:
        """Download the archive into ``folder`` and take the three files out of it."""
        archive = download(_SOURCES, folder / "wikitext-2-v1.zip", sha256=_SHA256)
        for path in self.paths(folder).values():
            extract_member(archive, f"{self.folder}/{path.name}", path)
