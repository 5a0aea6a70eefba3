"""Text files -> token shards -> Batch."""
