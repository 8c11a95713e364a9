"""A plan for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from della_dist.report.text import format_bytes, format_mem, format_seconds, note_lines
from della_dist.wording import plural


def plan_lines(plan: Mapping[str, Any], width: int | None = None) -> list[str]:
    """Return the lines that ``della-dist plan`` prints.

    Parameters
    ----------
    plan
        What `della_dist.runtime.describe.describe_plan` returned.
    width
        See `note_lines`.
    """
    experts = plan["experts"]
    into = f" into {plan['base']}" if plan["base"] is not None else ""
    lines = [
        f"merge   {plan['merge_method']}: {plural(len(experts), 'expert')}{into}",
        *(f"        {location}" for location in experts),
        f"output  {plan['num_parameters']:,} parameters in {plan['num_tensors']:,} tensors, "
        f"{format_bytes(plan['bytes_to_write'])}",
        f"tasks   {plural(plan['num_tasks'], 'shard')} of at most "
        f"{format_bytes(plan['shard_bytes'])}",
        f"files   {len(plan['files'])} beside the weights, "
        f"{format_bytes(sum(file['size_bytes'] for file in plan['files']))}",
        f"reads   {format_bytes(plan['bytes_to_read'])}",
        f"memory  {format_mem(plan['buffers_mem'])} of buffers, "
        f"{format_mem(plan['allowed_mem'])} allowed "
        f"({plan['workers']} workers, {plan['threads']} threads), and "
        f"{format_mem(plan['records_mem'])} of records",
        f"time    about {format_seconds(plan['estimated_s'])}",
    ]
    lines += note_lines(plan["notes"], width)
    if plan.get("complete"):
        lines.append(f"state   {plan['output']} is complete; merge would do nothing")
    elif plan.get("tasks_committed"):
        lines.append(
            f"state   {plan['output']} has {plan['tasks_committed']} of {plan['num_tasks']} "
            "shards; merge continues it"
        )
    lines.append("checks  passed; nothing was written")
    return lines
