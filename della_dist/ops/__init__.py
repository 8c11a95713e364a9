"""Pure mathematics: Philox, ranking, MagPrune, elect and fuse; Numba and torch backends.

`merge_tensor` merges one tensor given as raw bytes, `merge_arrays` one given as numpy arrays.
Neither Numba nor torch is imported before a backend is asked for.
"""

from della_dist.ops.tensor import load_backend, merge_arrays, merge_tensor
from della_dist.specs.recipe import Angles, MergeSettings, Overlap, TensorRecipe
from della_dist.specs.statistics import ExpertStats, TensorStats

__all__ = [
    "Angles",
    "ExpertStats",
    "MergeSettings",
    "Overlap",
    "TensorRecipe",
    "TensorStats",
    "load_backend",
    "merge_arrays",
    "merge_tensor",
]
