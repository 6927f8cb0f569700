"""Numbers and files of curvature-informed model merging. No platform: no Prefect, MLflow, boto3, transformers or lm-eval."""
