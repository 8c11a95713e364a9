"""The merge as it runs: worker, engines, resume, driver."""
