"""Scales of a merged edit learned by gradient: the edit's parts as a stream, a model that holds the merge, its gradient."""
