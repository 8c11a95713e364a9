"""The merge as it runs: inputs, worker, local engine, output and resume, verification."""
