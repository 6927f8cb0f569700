"""Weights that a file holds as codes with scales of their own (FP8, bitsandbytes, MXFP4, …), read as the numbers that they stand for."""
