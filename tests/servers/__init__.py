"""Servers, networks and clusters that tests run against; each is a context manager."""
