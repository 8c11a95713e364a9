"""The Hugging Face Hub, to write: a run's files wait in a folder here, and appear in one commit."""
