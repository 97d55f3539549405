"""Penn Treebank, the word-level corpus of Mikolov et al."""

from lit_sigsoftmax.recipes.penn_treebank.datamodule import PennTreebank

__all__ = ["PennTreebank"]
