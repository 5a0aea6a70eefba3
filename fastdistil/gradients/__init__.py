"""The way of a gradient from backward to the optimizer: buckets, compression, exchange."""
