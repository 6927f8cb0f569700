"""Will it merge: what a preflight measured as features, the merges that are known, the prediction, its page."""
