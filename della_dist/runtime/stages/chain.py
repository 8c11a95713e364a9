"""The stages of a run and its output: planned before any work, then made one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from della_dist.config import MergeConfig
from della_dist.config.stages import equal_words, needed
from della_dist.errors import StorageError, each
from della_dist.locations import absolute, of_parts
from della_dist.planning.build import MergePlan
from della_dist.planning.fingerprint import identity
from della_dist.runtime.budget import budget, with_remote
from della_dist.runtime.open_plan import located, open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.existing import open_output, refuse_overlap
from della_dist.runtime.stages.names import refuse_doubtful
from della_dist.runtime.stages.places import disk_of, stage_places
from della_dist.runtime.stages.planned import planned_stage
from della_dist.runtime.task.content import StoredContent
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.upstream import Stage, StageContent, store_of
from della_dist.storage.checkpoint import open_checkpoint
from della_dist.storage.opening import DEFAULT_CONNECTIONS
from della_dist.wording import plural

#: An output to run, or the manifest where it is complete.
Found = Output | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Link:
    """One merge of a run."""

    number: int
    """From 1 on."""
    name: str
    """Of the stage; empty: the last one, whose output is OUT."""
    merge: MergeConfig
    """With stages by their names."""
    config: MergeConfig
    """With stages by their locations."""
    needs: tuple[str, ...]
    """Names of the stages that it reads."""
    location: str | None
    """Of its output; None: OUT is not known."""
    plan: MergePlan
    found: Found | None
    """What is there of it; None: OUT is not known."""

    @property
    def is_complete(self) -> bool:
        """Whether its output is there already."""
        return isinstance(self.found, dict)


class Chain:
    """The merges of a run in their order, the last one's output being OUT.

    Every check that needs no tensor data is made here, for all of them, before any work; nothing
    is written. What reads a stage that is not made yet is planned with the plan of that.

    Parameters
    ----------
    config
        Of the run, stages included.
    out
        The output; None: only a plan is wanted.
    options
        How to run it; already applied to `config`.

    Raises
    ------
    ConfigError, InputError, OutputError
        Whatever a merge would be refused for.
    """

    def __init__(self, config: MergeConfig, out: str | None, options: RunOptions) -> None:
        if config.stages:
            refuse_doubtful(config, keep_stages=options.keep_stages)
        self._options = options
        self._upstream: dict[str, Stage] = {}
        self._places = stage_places(
            [str(stage.name) for stage in config.stages], out, options.staging
        )
        self.links: list[Link] = []
        merges = [*config.stages, replace(config, stages=())]

        def open_link(numbered: tuple[int, MergeConfig]) -> None:
            number, merge = numbered
            if not all(self._places[n] in self._upstream for n in needed(merge, self._places)):
                located(self._placed(merge), self._places.values())
                return  # what is wrong with those that it needs is said, too
            location = out if merge.name is None else self._places[merge.name]
            self.links.append(self._opened(number, merge, None if out is None else location))

        each(open_link, enumerate(merges, 1))
        for stage in self._upstream.values():  # tokenizers are large, and have been looked at
            if stage.planned is not None:
                stage.planned.forget()
        notes = equal_words(merges)
        if notes:
            plan = self.last.plan
            self.links[-1] = replace(self.last, plan=replace(plan, remarks=(*plan.remarks, *notes)))
        if config.stages and out is not None:
            self._check_together()

    @property
    def last(self) -> Link:
        """The merge whose output is OUT."""
        return self.links[-1]

    @property
    def stages(self) -> list[Link]:
        """The merges before that."""
        return self.links[:-1]

    def label(self, link: Link) -> str:
        """Return what a person calls a merge: its number and name; nothing where it is alone."""
        if len(self.links) == 1:
            return ""
        return f"stage {link.number} of {len(self.links)}: {link.name or 'the output'}"

    def is_planned(self, link: Link) -> bool:
        """Return whether a merge reads what was not made yet when it was planned."""
        return any(c.is_stage and not c.shards[0].version for c in link.plan.inputs)

    def to_do(self) -> list[Link]:
        """Return the merges that are to be run, in order.

        A stage is needed where it is to be kept, or by what is to be run itself.
        """
        needed: set[str] = set()
        found = []
        for link in reversed(self.links):
            is_wanted = not link.name or self._options.keep_stages or link.name in needed
            if is_wanted and not link.is_complete:
                needed.update(link.needs)
                found.append(link)
        return found[::-1]

    def rests_on_earlier(self) -> bool:
        """Return whether something that is to be run reads a stage of an earlier run."""
        needs = {name for link in self.to_do() for name in link.needs}
        return any(link.is_complete and link.name in needs for link in self.stages)

    def reopened(self, link: Link) -> Link:
        """Return a merge as it is planned now that the stages that it needs are made."""
        if link.is_complete or not self.is_planned(link):
            return link
        return self._opened(link.number, link.merge, link.location)

    def made(self, link: Link, digest: str) -> None:
        """Take note that the output of a stage is there now."""
        if link.is_complete:
            return
        assert link.location is not None
        record = _record(link.name, link.location, digest, identity(link.plan))
        self._upstream[link.location] = _made(link.location, (*link.plan.stages, record))

    def _opened(self, number: int, merge: MergeConfig, location: str | None) -> Link:
        options, upstream = self._options, self._upstream
        needs = tuple(needed(merge, self._places))
        config = self._placed(merge)
        plan = open_plan(
            replace(config, name=None),
            shard_bytes=options.shard_bytes,
            with_content=location is not None,
            stages=upstream,
        )
        found: Found | None = None
        if location is not None:
            is_last = merge.name is None  # stages are on a disk, wherever it goes
            found = open_output(
                location,
                plan,
                restart=options.restart,
                verify_resumed=options.verify_resumed,
                public=options.public and is_last,
                staging=options.staging if is_last else None,
            )
        link = Link(number, merge.name or "", merge, config, needs, location, plan, found)
        if merge.name is not None:
            at = self._places[merge.name]
            upstream[at] = self._stage(link, at)
        return link

    def _placed(self, merge: MergeConfig) -> MergeConfig:
        """Return a merge that names the places of stages."""
        where = {
            location: of_parts(location, lambda part: self._places.get(part, part))
            for location in merge.locations()
        }
        return merge.with_locations(where)

    def _stage(self, link: Link, location: str) -> Stage:
        """Return the output of a stage as what reads it sees it."""
        plan = link.plan
        if isinstance(link.found, dict):
            return _made(location, _recorded(link.name, location, plan, link.found))
        record = _record(link.name, location, None, identity(plan))
        return planned_stage(
            plan,
            location,
            (*plan.stages, record),
            content=StageContent(
                StoredContent(InputStores(DEFAULT_CONNECTIONS).get), self._upstream
            ),
            store_of=partial(store_of, stages=dict(self._upstream)),
        )

    def _check_together(self) -> None:
        """Check what no merge alone can: the places of all, memory of each, room for all."""
        for link in self.links:
            for other in self.links:
                if link.location is not None:
                    refuse_overlap(link.location, other.plan)
        runs = self.to_do()
        for link in runs:
            with_remote(
                budget(self._options), link.plan, link.location, elsewhere=self._options.on_ray
            )
        if not self._options.restart:  # what is there makes room
            _check_room([link.found for link in runs if isinstance(link.found, Output)])


def _made(location: str, records: tuple[Mapping[str, Any], ...]) -> Stage:
    return Stage(replace(open_checkpoint(location), is_stage=True), records)


def _record(name: str, location: str, digest: str | None, of: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `MergePlan.stages` says of a stage with this digest and identity."""
    return {"name": name, "location": absolute(location), "model_digest": digest, **of}


def _recorded(
    name: str, location: str, plan: MergePlan, manifest: Mapping[str, Any]
) -> tuple[Mapping[str, Any], ...]:
    """Return the records of a complete stage, and of those behind it, as it has them itself."""
    own = {key: manifest.get(key) for key in identity(plan)}
    record = _record(name, location, manifest["model_digest"], own)
    return (*manifest.get("stages", plan.stages), record)


def _check_room(outputs: list[Output]) -> None:
    """Check that the disk has room for all outputs together.

    Raises
    ------
    StorageError
        Stating what is needed and what is there.
    """
    on_disk: dict[int, list[Output]] = {}
    for output in outputs:
        if (disk := disk_of(output.store.location)) is not None:
            on_disk.setdefault(disk, []).append(output)
    for there in on_disk.values():
        needed = sum(output.needed_bytes for output in there)
        free = there[-1].store.free_bytes()
        if free is not None and free < needed:
            raise StorageError(
                f"{there[-1].store.location} has room for {free} bytes beside it, but {needed} are "
                f"needed for what is still to be written there, {plural(len(there) - 1, 'stage')} "
                "included. Make room there and run the same command again, or choose another "
                "output."
            )
