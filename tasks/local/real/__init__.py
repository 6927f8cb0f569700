"""The real study: its base, corpus, questions and training."""
