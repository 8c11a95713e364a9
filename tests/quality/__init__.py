"""What merges keep of what experts have learnt, on small models that are really trained.

``python -m tests.quality`` trains a base and its experts from scratch, of items that are made in
code, merges them by the engine, and prints what every method keeps. `test_quality` runs a reduced
one. Weights, items and merges depend on ``--seed`` alone, and each family runs on one thread.
"""
