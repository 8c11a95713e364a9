"""The page about a finished merge: ``della-dist report``."""
