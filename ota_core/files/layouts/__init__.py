"""Checkpoints of one model that lay its parameters out differently: experts in one stack or one by one, matrices fused or apart."""
