"""Bytes: stores, safetensors headers, checkpoints, shard writer, manifest."""
