"""Head to head: one recipe trained with several output layers over several seeds, and the table of what came out."""

from lit_sigsoftmax.compare.command import compare

__all__ = ["compare"]
