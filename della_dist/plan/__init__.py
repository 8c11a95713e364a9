"""Pure planning: shard layout, memory projection, checks."""
