"""MLflow: its store, runs, params, lineage and names."""
