"""One model trained by several processes: what they agree on, how they start, their mesh, and their shards."""
