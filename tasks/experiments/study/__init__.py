"""A grid of merges over replicates: its cells, scores, tables, pictures and log."""
