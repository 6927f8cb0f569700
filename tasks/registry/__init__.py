"""The champion: aliases, history, verdict, publishing, and what a night remembers."""
