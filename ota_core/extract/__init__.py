"""From two models to a LoRA adapter: the difference of each matrix as two factors, by a streamed singular value decomposition."""
