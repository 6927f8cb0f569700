"""Files of tensors, read lazily and written as a stream: safetensors, torch files, checkpoint folders."""
