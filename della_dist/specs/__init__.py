"""Frozen dataclasses that cross the rooms of the package.

`planning` makes them, `ops` and `storage` consume them, `runtime` carries them. Nothing here
imports more than the standard library, so that they are cheap to pickle and to import.

Shape legend used throughout the package: M experts, R rows, C columns (``delta_RC``).
"""
