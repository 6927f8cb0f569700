"""Merge rules on the CPU as compiled passes: every byte of a block is read once, at the memory's speed, without intermediate tensors.

The same operations in the same order as ``ota_core.methods`` and ``ota_core.methods.saliency``, hence the same bits (tests/ota_core/methods/test_fused.py).
A block is worked on in tiles of 1,024 elements, whose intermediate results stay in the first-level cache. numba compiles each loop
once and keeps it on disk; contraction to fused multiply-adds stays off.
"""
