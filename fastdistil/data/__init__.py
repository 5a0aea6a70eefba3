"""Text files become token shards, and token shards become batches."""
