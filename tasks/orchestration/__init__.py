"""What stands beside tasks in Prefect: pools, deployed runs, runners, credentials, progress, artifacts, events, deploying."""
