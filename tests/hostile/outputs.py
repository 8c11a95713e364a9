"""Places that cannot be written to."""

from __future__ import annotations

from pathlib import Path

from della_dist.config import load_config
from della_dist.storage.manifest import MANIFEST_NAME
from tests.hostile.situation import Family, Situation, hostile, save_family
from tests.merging import run


@hostile
def case_output_is_an_input(folder: Path) -> Situation:
    family = save_family(folder)
    return family.refused(str(family.experts[0]), "overlap", out=family.experts[0])


@hostile
def case_output_is_an_input_by_a_link(folder: Path) -> Situation:
    family = save_family(folder)
    link = folder / "link"
    link.symlink_to(family.base)
    return family.refused(str(link), str(family.base), "overlap", out=link)


@hostile
def case_output_inside_an_input(folder: Path) -> Situation:
    family = save_family(folder)
    out = family.base / "merged"
    return family.refused(str(out), str(family.base), "overlap", out=out)


@hostile
def case_output_around_the_inputs(folder: Path) -> Situation:
    family = save_family(folder)
    return family.refused(str(family.base), "overlap", out=folder)


@hostile
def case_output_is_a_file(folder: Path) -> Situation:
    family = save_family(folder)
    family.out.write_text("precious")
    return family.refused(str(family.out), "is a file")


@hostile
def case_output_under_a_file(folder: Path) -> Situation:
    family = save_family(folder)
    (folder / "file").write_text("precious")
    out = folder / "file" / "out"
    return family.refused(str(out), str(folder / "file"), "not a directory", out=out)


@hostile
def case_output_is_a_link_to_nothing(folder: Path) -> Situation:
    family = save_family(folder)
    family.out.symlink_to(folder / "gone")
    return family.refused(str(family.out), "link")


@hostile
def case_output_name_is_too_long(folder: Path) -> Situation:
    family = save_family(folder)
    out = folder / ("n" * 256)
    return family.refused("too long", out=out)


@hostile
def case_output_holds_a_configuration_of_somebody(folder: Path) -> Situation:
    family = save_family(folder)
    family.out.mkdir()
    (family.out / "config.json").write_text("precious")
    return family.refused(str(family.out), "config.json", "choose another output")


@hostile
def case_output_holds_a_card_of_somebody_and_restart(folder: Path) -> Situation:
    family = save_family(folder)
    family.out.mkdir()
    (family.out / "README.md").write_text("precious")
    return family.refused(str(family.out), "README.md", options=("--restart",))


@hostile
def case_output_holds_a_model_of_somebody_and_restart(folder: Path) -> Situation:
    family = save_family(folder)
    family.out.mkdir()
    (family.out / "model.safetensors").write_text("precious")
    return family.refused(str(family.out), "model.safetensors", options=("--restart",))


@hostile
def case_output_holds_a_model_in_other_files(folder: Path) -> Situation:
    # Not overwritten, but transformers would load it in place of the shards.
    family = save_family(folder)
    family.out.mkdir()
    (family.out / "model.safetensors").write_text("precious")
    options = ("--shard-size", "1")
    return family.refused(str(family.out), "model.safetensors", "loaded", options=options)


@hostile
def case_output_holds_a_folder_with_a_name_of_ours(folder: Path) -> Situation:
    family = save_family(folder)
    (family.out / "della_tensors.parquet").mkdir(parents=True)
    return family.refused(str(family.out), "della_tensors.parquet")


@hostile
def case_finished_output_beside_which_an_adapter_was_put(folder: Path) -> Situation:
    family = finished(folder)
    family.configure("seed: 41")
    (family.out / "adapter_model.safetensors").write_text("precious")
    return family.refused(str(family.out), "adapter_model.safetensors", "loaded")


@hostile
def case_unfinished_output_in_which_somebody_put_a_card(folder: Path) -> Situation:
    family = unfinished(folder)
    (family.out / "README.md").write_text("precious")
    return family.refused(str(family.out), "README.md", options=("--shard-size", "1"))


def finished(folder: Path) -> Family:
    """Return a family whose merge is complete, with another seed."""
    family = save_family(folder)
    family.configure("seed: 41")
    run(load_config(family.config), family.out)
    family.configure("seed: 42")
    return family


@hostile
def case_output_of_another_merge(folder: Path) -> Situation:
    family = finished(folder)
    return family.refused(str(family.out), "another merge", "config.seed", "41", "42", "--restart")


@hostile
def case_output_of_inputs_that_were_changed(folder: Path) -> Situation:
    family = finished(folder)
    family.configure("seed: 41")
    shard = family.experts[1] / "model.safetensors"
    shard.write_bytes(shard.read_bytes())
    return family.refused(str(family.out), "another merge", str(shard), "written to", "--restart")


@hostile
def case_output_in_other_shards(folder: Path) -> Situation:
    family = finished(folder)
    family.configure("seed: 41")
    return family.refused(
        str(family.out), "--shard-size", "777", "--restart", options=("--shard-size", "777")
    )


@hostile
def case_output_with_a_damaged_manifest(folder: Path) -> Situation:
    family = finished(folder)
    manifest = family.out / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes()[:-20])
    return family.refused(str(manifest), "damaged")


@hostile
def case_output_with_an_empty_manifest(folder: Path) -> Situation:
    family = finished(folder)
    (family.out / MANIFEST_NAME).write_bytes(b"")
    return family.refused(str(family.out / MANIFEST_NAME), "damaged")


def unfinished(folder: Path) -> Family:
    """Return a family whose merge was interrupted after the first shard, and its plan is there."""
    family = save_family(folder)
    interrupt(family)
    return family


def interrupt(family: Family) -> None:
    """Leave an unfinished output of the configuration as it is, with one shard committed."""
    import pytest

    from della_dist.runtime.output.commit import Output

    commit = Output.commit

    def commit_once(self: Output, record: object) -> None:
        if self.committed:
            raise ZeroDivisionError
        commit(self, record)  # type: ignore[arg-type]

    config = load_config(family.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "commit", commit_once)
        with pytest.raises(ZeroDivisionError):
            run(config, family.out, workers=1, shard_bytes=1)


@hostile
def case_unfinished_output_of_another_merge(folder: Path) -> Situation:
    family = unfinished(folder)
    family.configure("seed: 42")
    options = ("--shard-size", "1")
    return family.refused(
        str(family.out), "unfinished", "config.seed was 0, now 42", "--restart", options=options
    )


@hostile
def case_unfinished_output_with_a_damaged_plan(folder: Path) -> Situation:
    family = unfinished(folder)
    plan = family.out / ".della" / "plan.json"
    plan.write_bytes(plan.read_bytes()[:50])
    return family.refused(str(plan), "damaged", "--restart")


@hostile
def case_tying_changed_between_two_runs(folder: Path) -> Situation:
    # The headers are the same, but another set of tensors is merged.
    tied = '{"tie_word_embeddings": true}'
    family = save_family(folder)
    for checkpoint in (family.base, *family.experts):
        (checkpoint / "config.json").write_text(tied)
    interrupt(family)
    (family.base / "config.json").write_text("{}")
    for expert in family.experts:
        (expert / "config.json").write_text("{}")
    return family.refused(
        str(family.out), "lm_head.weight", "--restart", options=("--shard-size", "1")
    )
