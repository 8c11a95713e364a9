"""Who runs the tasks, and when."""
