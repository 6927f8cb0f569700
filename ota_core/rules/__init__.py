"""Merge rules bound to a plan: the recipe's options become arguments of the rules in ``methods`` and ``fused``."""
