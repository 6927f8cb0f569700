"""Measuring time and memory of every stage beside the floor of the same bytes."""
