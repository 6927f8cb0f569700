"""GGUF files of llama.cpp as checkpoints: Hugging Face's names, layouts and numbers, row by row."""
