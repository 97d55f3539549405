"""English from the Python installation itself: no download."""

from lit_sigsoftmax.recipes.python_docs.datamodule import PythonDocs

__all__ = ["PythonDocs"]
