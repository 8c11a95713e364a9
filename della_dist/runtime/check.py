"""Check that the models of a merge belong together, by a sample of their weights."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace

from della_dist.config import MergeConfig
from della_dist.errors import InputError
from della_dist.planning.build import MergePlan
from della_dist.planning.sampling import sampled
from della_dist.report.check import CheckSummary
from della_dist.report.remarks import refusal, remarks
from della_dist.report.run_events import ModelsChecked
from della_dist.report.run_log import tell
from della_dist.report.verdict import judge
from della_dist.runtime.compare import compare
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.stages.chain import Chain, Link
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.checkpoint import open_checkpoint
from della_dist.storage.opening import resolved

#: What a merge reads before it starts: a part of what it will read, but not less than blocks of
#: some 64 tensors of every model, and not more than the command.
_SHARE_BEFORE = 1 / 256
_LEAST_OF_A_MODEL, _MOST_BEFORE = 1 << 20, 256 << 20


def check(config: MergeConfig, out: str | None, *, sample_bytes: int) -> CheckSummary:
    """Return what a sample of the models that `config` names says of them.

    Parameters
    ----------
    config
        The validated configuration.
    out
        The output of the merge, which is compared with base and experts as well; None: it is not.
    sample_bytes
        What is read at most of the weights of each merge.

    Raises
    ------
    ConfigError, InputError
        Whatever a merge would be refused for; if `out` is no output of it.
    StorageError
        If weights cannot be read.
    """
    chain = Chain(config, None, RunOptions())
    output = None if out is None else _opened(out, chain.last.plan)
    stages = tuple(
        replace(_checked(link.plan, sample_bytes), name=link.name) for link in chain.stages
    )
    return replace(_checked(chain.last.plan, sample_bytes, output), stages=stages)


def check_before(link: Link, options: RunOptions) -> CheckSummary | None:
    """Check the models of a merge that is about to begin; return what was found of them.

    None of a merge that goes on: it was checked when it began, or was not to be.

    Raises
    ------
    InputError
        If one has another backbone, or is damaged, unless that is allowed.
    """
    found = link.found
    if not options.check or not isinstance(found, Output) or len(found.committed):
        return None
    num_models = len(link.plan.merged)
    share = int(_SHARE_BEFORE * link.plan.output_bytes * num_models)
    size = min(max(share, _LEAST_OF_A_MODEL * num_models), _MOST_BEFORE)
    checked = _checked(link.plan, size)
    tell(
        ModelsChecked(
            stage=link.name,
            models=tuple(dataclasses.asdict(model) for model in checked.models),
            bytes_read=checked.bytes_read,
            elapsed_s=checked.elapsed_s,
        )
    )
    refuse(checked, options)
    return checked


def refuse(checked: CheckSummary, options: RunOptions) -> None:
    """Raise `InputError` if a model has another backbone or is damaged, unless that is allowed."""
    # Of NaN and infinite values the configuration says what becomes; the merge finds them all.
    refused = [one for one in checked.refused if not one.num_nonfinite]
    if refused and not options.allow_mismatch:
        raise InputError(refusal(refused, checked.notes))


def _checked(
    plan: MergePlan, sample_bytes: int, output: CheckpointIndex | None = None
) -> CheckSummary:
    started_s = time.monotonic()
    samples = sampled(plan, sample_bytes, output)
    compared = compare(plan, samples, output)
    inputs = plan.inputs if output is None else (*plan.inputs, output)
    checks, pairs = judge(
        compared.found,
        lambda number: inputs[number].location,
        lambda number, shard: _file_name(inputs[number], shard),
    )
    last = None if output is None else len(plan.inputs)
    models = tuple(one for number, one in checks.items() if number != last)
    of_models = tuple(pair for a, b, pair in pairs if last not in (a, b))
    return CheckSummary(
        models=models,
        pairs=of_models,
        output=None if last is None else checks.get(last),
        output_pairs=tuple(pair for a, b, pair in pairs if last in (a, b)),
        num_tensors=len(samples),
        num_compared=sum(plan.matching.actions[name] == "merge" for name in plan.matching.actions),
        bytes_read=compared.bytes_read,
        elapsed_s=time.monotonic() - started_s,
        notes=tuple(remarks(models, of_models)),
    )


def _file_name(checkpoint: CheckpointIndex, shard: int) -> str:
    """Return the name of a shard; nothing of a model with adapters, which has several."""
    return checkpoint.shards[shard].name if shard < len(checkpoint.shards) else ""


def _opened(out: str, plan: MergePlan) -> CheckpointIndex:
    """Return the output of a plan.

    Raises
    ------
    InputError
        If it is none.
    """
    if plan.adapter is not None:
        raise InputError(
            f"{out} is an adapter, and no model: check a configuration that has "
            f"{plan.reference.location}+{out} among its models."
        )
    opened = open_checkpoint(resolved(out))
    for shard in plan.shards:
        for tensor in shard.tensors:
            entry = opened.tensors.get(tensor.name)
            if entry is None or entry.shape != tensor.shape:
                has = "no such tensor" if entry is None else f"one of shape {list(entry.shape)}"
                raise InputError(
                    f"{out} is no output of this configuration, which has {tensor.name} of shape "
                    f"{list(tensor.shape)}; there is {has}."
                )
    return opened
