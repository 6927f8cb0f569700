"""Suites, lm-eval, scores, paired statistics, the gate. lm-eval is imported here alone."""
