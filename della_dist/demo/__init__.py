"""A small family of models that looks like the real thing, to try the tool on."""

from della_dist.demo.family import EXPERT_NAMES, FamilyPaths, make_family

__all__ = ["EXPERT_NAMES", "FamilyPaths", "make_family"]
