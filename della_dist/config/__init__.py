"""The merge configuration: mergekit's YAML, read safely and validated before anything is opened.

`load_config` reads a file, `parse_config` a text, `config_from_mapping` a mapping; each returns a
frozen `MergeConfig` or raises a `ConfigError` of one paragraph that says where, what, and what to
do. Relative locations of checkpoints are relative to the current directory, as in mergekit.
"""

from della_dist.config.layers import layer_fraction
from della_dist.config.load import config_from_mapping, load_config, parse_config
from della_dist.config.methods import METHODS, Method
from della_dist.config.model import ExpertModel, MergeConfig
from della_dist.config.scalars import parse_dtype
from della_dist.config.settings import Branch, Setting

__all__ = [
    "METHODS",
    "Branch",
    "ExpertModel",
    "MergeConfig",
    "Method",
    "Setting",
    "config_from_mapping",
    "layer_fraction",
    "load_config",
    "parse_config",
    "parse_dtype",
]
