"""della_dist: distributed, out-of-core DELLA merging of very large checkpoints."""

__version__ = "0.1.0"
