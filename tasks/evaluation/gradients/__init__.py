"""Losses and gradients of models in memory: texts as blocks of tokens, networks, and second moments estimated from both."""
