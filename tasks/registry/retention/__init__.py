"""What may be deleted: outputs that nothing refers to, and what the cache no longer needs."""
