"""The content-addressed store of stage outputs."""
