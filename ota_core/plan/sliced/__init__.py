"""Results that are put together from ranges of layers."""
