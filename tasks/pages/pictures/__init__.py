"""Pictures as Altair charts: one chart gives the interactive picture on a page and the still image in a file."""
