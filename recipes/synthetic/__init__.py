"""A generated language of known rank and entropy."""

from lit_sigsoftmax.recipes.synthetic.datamodule import SyntheticLanguage

__all__ = ["SyntheticLanguage"]
