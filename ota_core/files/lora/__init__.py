"""LoRA adapters in PEFT's form as models: their edit of a base is made row by row, as it is read."""
