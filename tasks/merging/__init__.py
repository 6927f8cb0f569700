"""From a recipe to the inputs of a merge: sources, recipes, architectures, what is read."""
