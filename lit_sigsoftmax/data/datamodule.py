"""CorpusDataModule: a corpus as sharded streams of segments, whatever the corpus."""

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_sigsoftmax.checkpoints import CheckpointError
from lit_sigsoftmax.data.corpus import Corpus, load_text_corpus
from lit_sigsoftmax.data.streams import Segments, eval_streams, shard, train_streams

__all__ = ["CorpusDataModule", "TextCorpus"]


class CorpusDataModule(LightningDataModule, ABC):
    """Base of all datamodules: subclasses say what the corpus is by implementing :meth:`load_corpus`.

    Args:
        batch_size: Training streams, over all devices together: each takes an equal share.
        eval_batch_size: Validation streams, over all devices together. Perplexity depends on it a little: every stream
            starts with a fresh state.
        test_batch_size: Test streams, over all devices together.
        bptt: Tokens of a segment: the length of truncated backpropagation through time.
        context_min: For models without carried state: each validation and test prediction sees at least so many earlier
            tokens, where they exist. 0 for models that carry a state.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 20,
        eval_batch_size: int = 10,
        test_batch_size: int = 1,
        bptt: int = 35,
        context_min: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.eval_batch_size = _at_least(1, "eval_batch_size", eval_batch_size)
        self.test_batch_size = _at_least(1, "test_batch_size", test_batch_size)
        self.bptt = _at_least(1, "bptt", bptt)
        self.context_min = _at_least(0, "context_min", context_min)

    @abstractmethod
    def load_corpus(self) -> Corpus:
        """Read the corpus.

        Called once in each process, possibly by many processes at the same time and before the trainer exists, because
        the model needs the vocabulary's size. :func:`lit_sigsoftmax.data.load_text_corpus` is safe for that.
        """

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus, read when first needed."""
        return self.load_corpus()

    @property
    def vocab_size(self) -> int:
        """The number of types, which the command line links to the model's ``vocab_size``."""
        return len(self.corpus.vocabulary)

    @property
    def name(self) -> str:  # type: ignore[override]  # an attribute in LightningDataModule
        """The corpus's name."""
        return self.corpus.name

    def prepare_data(self) -> None:
        """Read the corpus on one process of each machine before the others, so that one alone downloads and encodes."""
        _ = self.corpus

    def setup(self, stage: str) -> None:
        """Let streams that cannot be cut fail before anything is trained."""
        if stage == "fit":
            self.check(self._place()[1])

    def check(self, world_size: int) -> None:
        """Cut all streams for so many devices.

        Raises:
            ValueError: If a split has fewer tokens than streams, or the training streams do not divide.
        """
        corpus, eos_id = self.corpus, self.corpus.vocabulary.eos_id
        shard(train_streams(corpus.train, self.batch_size, eos_id), 0, world_size, exact=False)
        eval_streams(corpus.valid, self.eval_batch_size, eos_id)
        eval_streams(corpus.test, self.test_batch_size, eos_id)

    def state_dict(self) -> dict[str, Any]:
        """What corpus a checkpoint is of."""
        tokens = json.dumps(self.corpus.vocabulary.tokens).encode()
        vocabulary = hashlib.blake2b(tokens, digest_size=16).hexdigest()
        return {"name": self.name, "fingerprint": self.corpus.fingerprint, "vocabulary": vocabulary}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another vocabulary; to continue training, of another text.

        Raises:
            CheckpointError: The checkpoint is of another one.
        """
        own = self.state_dict()
        if state_dict["vocabulary"] != own["vocabulary"]:
            raise CheckpointError(
                f"the checkpoint is of another vocabulary: it was trained on {state_dict['name']!r}, whose types are "
                f"not the {self.vocab_size} of {self.name!r} here, or not in this order"
            )
        if self.trainer and self.trainer.training and state_dict["fingerprint"] != own["fingerprint"]:
            raise CheckpointError(
                f"the checkpoint is of another text: {state_dict['name']!r} with fingerprint "
                f"{state_dict['fingerprint']}, here {self.name!r} with {own['fingerprint']}; continue on the same data"
            )

    def train_dataloader(self) -> Segments:
        """This rank's training streams."""
        streams = train_streams(self.corpus.train, self.batch_size, self.corpus.vocabulary.eos_id)
        return Segments(*shard(streams, *self._place(), exact=False), bptt=self.bptt)

    def val_dataloader(self) -> Segments:
        """This rank's validation streams: over all ranks, every token is predicted once."""
        return self._evaluation(self.corpus.valid, self.eval_batch_size)

    def test_dataloader(self) -> Segments:
        """This rank's test streams: over all ranks, every token is predicted once."""
        return self._evaluation(self.corpus.test, self.test_batch_size)

    def predict_dataloader(self) -> Segments:
        """The test streams."""
        return self.test_dataloader()

    def _evaluation(self, tokens: Tensor, n_streams: int) -> Segments:
        streams = eval_streams(tokens, n_streams, self.corpus.vocabulary.eos_id)
        return Segments(*shard(streams, *self._place(), exact=True), bptt=self.bptt, context=self.context_min)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class TextCorpus(CorpusDataModule):
    """Any corpus that stands in a folder as three UTF-8 text files, named after the folder.

    Args:
        root: The folder.
        min_count: Types rarer than this in the training file become ``<unk>``.
        train: Name of the training file.
        valid: Name of the validation file.
        test: Name of the test file.
        **streams: The arguments of :class:`CorpusDataModule`.
    """

    def __init__(
        self,
        root: str,
        min_count: int = 1,
        train: str = "train.txt",
        valid: str = "valid.txt",
        test: str = "test.txt",
        **streams: int,
    ) -> None:
        super().__init__(**streams)
        self.root = root
        self.min_count = _at_least(1, "min_count", min_count)
        self.files = {"train": train, "valid": valid, "test": test}

    def load_corpus(self) -> Corpus:
        """Read the three files.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one is not UTF-8 text, is empty, or has a token that cannot be encoded.
        """
        folder = Path(self.root).expanduser().resolve()
        paths = {split: folder / file for split, file in self.files.items()}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"no {' or '.join(missing)} in {folder}: check data.root and the file names")
        return load_text_corpus(folder.name, paths, min_count=self.min_count)


def _at_least(least: int, name: str, value: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"data.{name} must be an integer of at least {least}, got {value!r}")
    return value
