"""Experts below a prefix: finding, checking and publishing them."""
