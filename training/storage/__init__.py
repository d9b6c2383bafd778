"""Files, folders and the cache, on disk and in S3."""
