"""The Ray engine: the only folder that imports ray."""
