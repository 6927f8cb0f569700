"""Whether models fit together: their configurations, names, quantisations, chat templates."""
