"""Recipes: what to merge and how, typed and checked, YAML in and out."""
