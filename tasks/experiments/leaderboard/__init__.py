"""The merges of an MLflow experiment, ranked: table, statistics, picture and log."""
