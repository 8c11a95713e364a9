"""Object stores and servers."""
