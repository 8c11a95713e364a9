"""The Hugging Face Hub, to read: what a commit holds, from the cache or in ranges."""
