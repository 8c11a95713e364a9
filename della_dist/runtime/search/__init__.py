"""Find values of a configuration: merge, evaluate, and choose what is tried next."""
