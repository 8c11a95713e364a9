"""What ``della-dist demo`` does: make a family, merge it, verify it, say what to look at next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from della_dist.config import load_config
from della_dist.demo.family import make_family
from della_dist.errors import OutputError
from della_dist.report.display import ProgressDisplay
from della_dist.report.progress import Goal, Snapshot
from della_dist.report.run_log import lines_to
from della_dist.report.summary import MergeSummary, VerifySummary
from della_dist.report.text import format_bytes, format_mem, format_seconds
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.verify import verify

#: Tensors of the demo that are merged again from the inputs to check the output.
NUM_RECOMPUTED = 5


def run_demo(
    directory: Path, say: Callable[[str], None], *, quiet: bool = False
) -> tuple[MergeSummary, VerifySummary]:
    """Make a family in `directory` (unless it is there), merge it into ``merged``, and verify that.

    Parameters
    ----------
    directory
        Created if need be.
    say
        Called with each line for the person watching.
    quiet
        Whether no progress is shown.

    Raises
    ------
    OutputError
        If `directory` is a file, or holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{directory} is a file; the demo is made in a directory. Name another.")
    config_path = directory / "demo.yaml"
    if config_path.exists():
        say(f"the model family in {directory} is there already")
    else:
        say(f"making a base and three experts of 38 million parameters in {directory} ...")
        make_family(directory)
    out = directory / "merged"
    with ProgressDisplay(quiet=quiet) as display, lines_to(display.say):

        def watch(goal: Goal, snapshot: Callable[[], Snapshot]) -> None:  # if there is work to do
            say(f"merging them as {config_path} says (the first run compiles the kernels) ...")
            display.watch(goal, snapshot)

        merged = merge(load_config(config_path), str(out), RunOptions(), watch=watch)
    if merged.tasks_resumed == merged.num_tasks:
        say(f"{out} is complete already; nothing was merged")
    else:
        say(
            f"merged {merged.num_tensors} tensors in {format_seconds(merged.elapsed_s)}: read "
            f"{format_bytes(merged.bytes_read)}, wrote {format_bytes(merged.bytes_written)}, peak "
            f"memory {format_mem(merged.peak_rss_bytes)}"
        )
    verified = verify(str(out), recompute=NUM_RECOMPUTED)
    say(
        f"verified {verified.num_files} files and recomputed {len(verified.recomputed)} tensors "
        "from the inputs: equal"
    )
    say(f"digest {merged.model_digest}")
    say("")
    say("what to look at next:")
    say(f"  {config_path}  the recipe: change it, and merge it into another directory")
    say(f"  {out}/README.md  the model card that was written")
    say(f"  {out}/della_tensors.parquet  what happened to every tensor of every expert")
    say(f"  della-dist check {config_path}  how far the experts are from their base")
    say(f"  della-dist report {out}  a page with pictures of what became of them")
    say(f"  della-dist plan {config_path}  what a merge will read, write and need")
    say(f"  della-dist merge {config_path} {directory}/again --seed 1  other random words")
    say(f"  AutoModelForCausalLM.from_pretrained({str(out)!r})  it loads with transformers")
    return merged, verified
