"""The command ``ota``: a file for each family of commands, ``app.py`` on top."""
