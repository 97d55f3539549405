"""WikiText-2, the word-level corpus of Merity et al."""

from lit_sigsoftmax.recipes.wikitext2.datamodule import WikiText2

__all__ = ["WikiText2"]
