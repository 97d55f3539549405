"""Recipes: for each corpus a datamodule and complete configurations. Installed as ``lit_sigsoftmax.recipes``."""
