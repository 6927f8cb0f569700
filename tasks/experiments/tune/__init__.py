"""Scales of a recipe learned by gradient on validation documents: configuration, documents, objectives, learning, result, log."""
