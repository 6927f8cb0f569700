"""A search for the parameters of a recipe: its space, trials, result, picture and log."""
