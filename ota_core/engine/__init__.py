"""The stages of a merge as functions of files, in one process or in shards, and the folder that they leave."""
