"""Merge rules: pure functions on blocks of tensors. Tensors in, tensor out; no files, no recipes, no logging.

Legend of the arguments, the same in every file:
  thetas   list of M tensors, float64 (r, C): the experts' weights θ_m in this block
  deltas   list of M tensors, float64 (r, C): task vectors Δ_m = θ_m − θ₀
  base     float64 (r, C): θ₀
  masks    list of M tensors, bool (r, C), or None where an expert keeps everything
Results are float64 (r, C); the engine rounds them once, to the output's dtype.
"""
