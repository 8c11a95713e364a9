"""Pure planning: which tensors, in which shards, in how much memory. Reads nothing, writes nothing.

The public names are in the modules: `della_dist.planning.build.build_plan` makes a validated
`della_dist.planning.build.MergePlan` from the configuration and the headers of every checkpoint.
"""
