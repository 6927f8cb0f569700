"""The demo: its data, and the real training of a small base and five experts."""
