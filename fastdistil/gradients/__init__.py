"""From backward to the optimizer: buckets, compression, exchange."""
