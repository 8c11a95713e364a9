"""Which tasks had better run where: on nodes whose own disks have the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from della_dist.locations import absolute
from della_dist.planning.build import MergePlan
from della_dist.planning.layout import ShardLayout
from della_dist.specs.reading import bytes_of_pieces, passes


def file_labels(plan: MergePlan, node_labels: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return the label of every input shard that some glob names, by (location, shard's index).

    Parameters
    ----------
    plan
        Whose inputs.
    node_labels
        Glob -> label, first match; a glob is compared with the whole path or URL of a shard, and
        its ``*`` also stands for slashes.
    """
    labels = {}
    for checkpoint in plan.inputs:
        root = absolute(checkpoint.location).rstrip("/")
        for shard in checkpoint.shards:
            for glob, label in node_labels.items():
                if fnmatchcase(f"{root}/{shard.name}", glob):
                    labels[checkpoint.location, shard.name] = label
                    break
    return labels


def local_bytes(
    plan: MergePlan, shard: ShardLayout, labels: Mapping[tuple[str, str], str]
) -> dict[str, int]:
    """Return label -> bytes of what a task reads that lie on nodes so labelled."""
    totals: dict[str, int] = {}
    for tensor in shard.tensors:
        source = plan.source(tensor)
        for leaf, size_bytes in bytes_of_pieces(source):
            checkpoint = plan.inputs[leaf.checkpoint]
            shard_name = checkpoint.shards[leaf.entry.shard].name
            label = labels.get((checkpoint.location, shard_name))
            if label is not None:
                totals[label] = totals.get(label, 0) + passes(source)[0] * size_bytes
    return totals
