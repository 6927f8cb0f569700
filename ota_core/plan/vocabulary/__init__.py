"""Embedding rows by token: which row of a model stands for which of the output, and what stands in for those that it lacks."""
