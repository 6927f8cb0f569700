"""Where models lie: S3, folders, the hub; the local cache of what was fetched. boto3 is imported here alone."""
