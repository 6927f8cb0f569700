"""Models in S3 read where they lie: outlines here, tensors by ranges."""
