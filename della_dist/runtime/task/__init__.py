"""What one worker does for one output shard."""
