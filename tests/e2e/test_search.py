"""`della-dist search` finds the values that a configuration leaves open."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result
from optuna.storages.journal import JournalFileBackend

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, OutputError, RunError
from della_dist.report.search import SearchSummary
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.search import at_once as at_once_module
from della_dist.runtime.search import run as run_module
from della_dist.runtime.search.evaluators import Command, Evaluation, Failed, evaluation
from della_dist.runtime.search.run import Effort, search
from della_dist.runtime.search.scoring import InFolder, Table
from della_dist.runtime.search.spaces import open_space
from della_dist.runtime.verify import verify
from tests.checkpoints import load_tensors, save_checkpoint, tensor, values_of
from tests.e2e.test_report import rows
from tests.interrupting import Killed
from tests.merging import assert_paragraph
from tests.unit.test_report_page import Page

NAME = "model.layers.0.mlp.up_proj.weight"
BEST = (0.8, -0.4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a base, two experts, and a space of their weights."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.05, (16, 24))
    deltas = rng.normal(0, 0.01, (2, 16, 24))
    save_checkpoint(tmp_path / "base", {NAME: tensor(base, "F32")})
    for m, delta in enumerate(deltas):
        save_checkpoint(tmp_path / f"expert{m}", {NAME: tensor(base + delta, "F32")})
    target = base + BEST[0] * deltas[0] + BEST[1] * deltas[1]
    np.save(tmp_path / "target.npy", target)
    models = [
        {"model": str(tmp_path / f"expert{m}"), "parameters": {"weight": {"search": [-1, 1]}}}
        for m in range(2)
    ]
    document = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**document, "models": models}))
    return tmp_path


def nearness(folder: Path) -> Callable[[str], Evaluation]:
    """Return what says how near a merge is to the best one."""
    target = np.load(folder / "target.npy")

    def evaluate(model: str) -> Evaluation:
        found = values_of(load_tensors(Path(model))[NAME])
        return Evaluation(-float(np.linalg.norm(found - target)), {})

    return evaluate


@dataclass(frozen=True)
class By:
    """A function scores the folders of merges."""

    evaluate: Callable[[str], Evaluation]
    identity: str = "test"

    def opened(self, folder: Path, options: RunOptions) -> InFolder:
        return InFolder(folder, self.evaluate, options)


def run(
    folder: Path, out: str, evaluate: Callable[[str], Evaluation], trials: int, seed: int = 0
) -> SearchSummary:
    space = open_space(folder / "space.yaml", auto=False)
    return search(space, str(folder / out), By(evaluate), Effort(trials), seed=seed)


def test_it_finds_what_is_best(folder: Path) -> None:
    """Better than any of a grid of one weight for both, and what is merged is what was best."""
    found = run(folder, "out", nearness(folder), 30)
    experts = [values_of(load_tensors(folder / f"expert{m}")[NAME]) for m in range(2)]
    base, target = values_of(load_tensors(folder / "base")[NAME]), np.load(folder / "target.npy")
    both = sum(expert - base for expert in experts)
    grid = [-np.linalg.norm(base + x * both - target) for x in np.linspace(-1, 1, 21)]
    assert found.score > max(grid) + 0.05
    assert found.first == pytest.approx(-np.linalg.norm(base - target), rel=1e-4)
    merged = values_of(load_tensors(folder / "out")[NAME])
    assert -np.linalg.norm(merged - target) == found.score
    again = CliRunner().invoke(main, ["merge", found.config, str(folder / "again"), "--json"])
    assert json.loads(again.stdout)["model_digest"] == found.model_digest
    assert not (folder / "out.search" / "trials").exists()


@dataclass(frozen=True)
class ByValues:
    """Scores configurations without merging them."""

    identity: str = "values"

    def opened(self, folder: Path, options: RunOptions) -> ByValues:
        return self

    def __call__(self, config: MergeConfig) -> Evaluation:
        a, b = config.settings_for(NAME, 0.0).weights
        return Evaluation(-((a - BEST[0]) ** 2) - (b - BEST[1]) ** 2, {})

    def closing(self, first: MergeConfig, best: MergeConfig) -> Table:
        return {}


@pytest.mark.parametrize("at_once", [1, 3])
def test_killed_at_any_instant(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Whatever was written last, the same command goes on: the same trials, the same end."""
    left = math.inf
    append = JournalFileBackend.append_logs

    def dies(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", dies)
    monkeypatch.setattr(at_once_module._Here, "num_at_once", at_once)
    space = open_space(folder / "space.yaml", auto=False)

    def go_on(out: str, trials: int) -> SearchSummary:
        return search(space, str(folder / out), ByValues(), Effort(trials))

    whole = go_on("whole", 11)
    num_kills = 0
    for first in range(8):
        out = f"out{first}"
        for life in count():  # short and long ones, so that it gets on
            left = (first + 7 * life) % 23
            try:
                found = go_on(out, 11)
            except Killed:
                num_kills += 1
            else:
                break
        assert found.trials == tuple(
            replace(one, seconds=again.seconds)
            for one, again in zip(whole.trials, found.trials, strict=True)
        )
        assert (found.values, found.model_digest) == (whole.values, whole.model_digest)
    assert num_kills > 5 * 8
    left = math.inf
    part = go_on("in two", 4)
    second = go_on("in two", 11)
    assert [one.values for one in second.trials] == [one.values for one in whole.trials]
    assert second.trials[:4] == part.trials
    assert (second.score, second.model_digest) == (whole.score, whole.model_digest)
    assert second.score > part.score  # what the first had merged gave way


def test_no_trial_begins_after_the_timeout(folder: Path) -> None:
    space = open_space(folder / "space.yaml", auto=False)
    with pytest.raises(RunError, match="no trial ended in time"):
        search(space, str(folder / "never"), ByValues(), Effort(9, 0.0))
    result = invoke(folder, f"import time; time.sleep(1.1)\n{SCRIPT}", "--timeout", 1, "--json")
    assert len(json.loads(result.stdout)["trials"]) == 1


def test_a_journal_that_lost_its_end(folder: Path) -> None:
    """As when the power goes: what is whole counts."""
    whole = run(folder, "out", nearness(folder), 3)
    journal = folder / "out.search" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-4])[:-20])  # in the last trial, before OUT was begun
    shutil.rmtree(folder / "out")
    again = run(folder, "out", nearness(folder), 3)
    assert [one.values for one in again.trials] == [one.values for one in whole.trials]
    journal.write_bytes(b"{}}\n" + journal.read_bytes())
    with pytest.raises(OutputError, match="is damaged"):
        run(folder, "out", nearness(folder), 3)


def test_seeds(folder: Path) -> None:
    one, other = (run(folder, f"out{seed}", nearness(folder), 4, seed) for seed in (0, 1))
    assert one.trials[0].values == other.trials[0].values  # the middle
    assert one.trials[1].values != other.trials[1].values


def test_failures_are_recorded(folder: Path) -> None:
    evaluate, calls = nearness(folder), 0

    def fails(model: str) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise Failed("it is odd")
        return evaluate(model)

    found = run(folder, "out", fails, 6)
    assert [one.reason for one in found.trials] == ["it is odd", None] * 3
    assert found.first is None
    assert found.score == max(one.score for one in found.trials if one.score is not None)

    def never(model: str) -> Evaluation:
        raise Failed("it is broken")

    with pytest.raises(RunError, match="none of 3 trials has a score; the last one: it is broken"):
        run(folder, "none", never, 3)


def test_another_search_in_the_same_place(folder: Path) -> None:
    run(folder, "out", nearness(folder), 1)
    with pytest.raises(OutputError, match="holds another search"):
        run(folder, "out", nearness(folder), 1, seed=5)
    space = (folder / "space.yaml").read_text()
    (folder / "space.yaml").write_text(space.replace("- 1\n", "- 2\n"))
    with pytest.raises(OutputError, match="holds another search"):
        run(folder, "out", nearness(folder), 2)


def test_other_merges_in_the_same_place(folder: Path) -> None:
    """Scores of other weights, or other random words, are no trials of this search."""
    space, scoring = open_space(folder / "space.yaml", auto=False), By(nearness(folder))

    def go_on(trials: int, **options: Any) -> SearchSummary:
        options = {"check": False, **options}
        effort = Effort(trials)
        return search(space, str(folder / "out"), scoring, effort, options=RunOptions(**options))

    go_on(1)
    with pytest.raises(OutputError, match=r"config.seed was 0, now 7.*name another output"):
        go_on(2, seed=7)
    assert len(go_on(2, seed=0, threads=1).trials) == 2
    weights = values_of(load_tensors(folder / "expert1")[NAME])
    kept = (folder / "expert1").rename(folder / "kept")
    shutil.copytree(kept, folder / "expert1")  # the same content, of another time
    assert len(go_on(3).trials) == 3
    shutil.rmtree(folder / "expert1")
    save_checkpoint(folder / "expert1", {NAME: tensor(weights + 0.1, "F32")})
    with pytest.raises(OutputError, match=r"holds trials of other merges: .*expert1"):
        go_on(4)
    shutil.rmtree(folder / "out.search")
    shutil.rmtree(folder / "out")
    assert len(go_on(1).trials) == 1


def test_another_content_of_a_model_that_is_a_choice(folder: Path) -> None:
    """It is no input of what is tried first."""
    document = yaml.safe_load((folder / "space.yaml").read_text())
    shutil.copytree(folder / "expert1", folder / "expert2")
    choices = [str(folder / "expert2"), str(folder / "expert1")]
    document["models"][1]["model"] = {"choices": choices}
    (folder / "space.yaml").write_text(yaml.safe_dump(document))
    run(folder, "out", nearness(folder), 1)
    for name in ("expert1", "expert2"):
        weights = values_of(load_tensors(folder / name)[NAME])
        kept = (folder / name).rename(folder / "kept")
        save_checkpoint(folder / name, {NAME: tensor(weights + 0.001, "F32")})
        with pytest.raises(OutputError, match=f"holds trials of other merges: .*{name}"):
            run(folder, "out", nearness(folder), 2)
        shutil.rmtree(folder / name)
        kept.rename(folder / name)


def test_a_merge_that_a_user_made_meanwhile(folder: Path) -> None:
    """In the place of what the search had merged; it is not what gives way to a better trial."""
    space, out = open_space(folder / "space.yaml", auto=False), folder / "out"

    def go_on(trials: int, evaluate: ByValues | MergesMeanwhile = ByValues()) -> SearchSummary:
        return search(space, str(out), evaluate, Effort(trials), options=RunOptions(check=False))

    def merges_own() -> str:
        shutil.rmtree(out)
        own = {**space.first, "models[0].parameters.weight": 0.123}
        return merge(space.config(own), str(out), RunOptions(check=False)).model_digest

    class MergesMeanwhile(ByValues):
        def opened(self, folder: Path, options: RunOptions) -> ByValues:
            merges_own()
            return self

    go_on(1)
    digest = merges_own()
    with pytest.raises(OutputError, match="is there already, and not by this search"):
        go_on(8)
    assert verify(str(out)).model_digest == digest
    shutil.rmtree(out)
    assert len(go_on(2).trials) == 2  # none more was made before it was refused
    with pytest.raises(OutputError, match="is there already, and not by this search"):
        go_on(11, MergesMeanwhile())
    assert verify(str(out)).model_digest == digest


def test_killed_while_a_better_one_is_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what was there gave way, and then a still better one is found."""
    space, out = open_space(folder / "space.yaml", auto=False), folder / "out"

    def go_on(trials: int) -> SearchSummary:
        effort, options = Effort(trials), RunOptions(check=False)
        return search(space, str(out), ByValues(), effort, options=options)

    def dies(*_: object) -> None:
        raise Killed

    first = go_on(1)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "merge", dies)
        with pytest.raises(Killed):
            go_on(4)
        assert verify(str(out)).model_digest == first.model_digest
        with pytest.raises(Killed):
            go_on(11)
    assert go_on(11).score > first.score


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command(folder: Path, script: str) -> str:
    (folder / "evaluate.py").write_text(script)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(folder / 'evaluate.py'))} {{model}}"


def invoke(folder: Path, script: str, *options: object) -> Result:
    words = ["search", folder / "space.yaml", folder / "out", "--evaluate", command(folder, script)]
    return CliRunner().invoke(main, [*map(str, words), *map(str, options)])


SCRIPT = """
import json, pathlib, sys
count = pathlib.Path(__file__).with_name("count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
print(json.dumps({"score": len(count.read_text()), "model": sys.argv[1]}))
"""


def test_the_command(folder: Path) -> None:
    log = folder / "log.json"
    result = invoke(folder, SCRIPT, "--trials", 3, "--log-json", log)
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in log.read_text().splitlines()]
    trials = [e for e in events if e["event"] == "trial"]
    assert [(e["number"], e["num_trials"], e["score"]) for e in trials] == [
        (1, 3, 1),
        (2, 3, 2),
        (3, 3, 3),
    ]
    assert sum(e["event"] == "end" for e in events) == 4  # the trials, and the best
    assert events[-1]["output"] == str(folder / "out")
    assert "trial 3/3: 3, best 3" in result.stderr
    for words in ("score of what was tried first  1", "weight of expert0: "):
        assert words in result.stdout
    again = json.loads(invoke(folder, SCRIPT, "--trials", 3, "--json").stdout)
    assert [one["score"] for one in again["trials"]] == [1, 2, 3]  # not one more was made
    assert again["config"] == str(folder / "out.search" / "best.yaml")
    places = ["--to", str(folder / "page.html"), "--png", str(folder / "png")]
    assert CliRunner().invoke(main, ["report", str(folder / "out"), *places]).exit_code == 0
    assert {"trials.png", "values.png"} <= {one.name for one in (folder / "png").iterdir()}
    page = (folder / "page.html").read_text()
    Page(page)  # is well-formed
    numbers = rows(page, "Score of each trial: numbers")
    assert [numbers[str(i)][:2] for i in (1, 2, 3)] == [["1", "1"], ["2", "2"], ["3", "3"]]
    tried = rows(page, "Score against each value: numbers")
    values = list(again["trials"][2]["values"].values())
    assert tried["3"] == ["3", *(f"{value:.4g}" for value in values)]


def test_killed_with_the_evaluation(folder: Path) -> None:
    """The signal that nobody can catch: the next run goes on."""
    script = SCRIPT + (
        "import os, signal, time\n"
        "if len(count.read_text()) == 2:\n"
        "    pathlib.Path(__file__).with_name('evaluator').write_text(str(os.getpid()))\n"
        "    time.sleep(0.5)\n"  # the search has begun to wait
        "    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(60)\n"
    )
    words = [sys.executable, "-m", "della_dist", "search", str(folder / "space.yaml")]
    words += [str(folder / "out"), "--evaluate", command(folder, script), "--trials", "3"]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert (folder / "out.search" / "trials").exists()
    evaluator = int((folder / "evaluator").read_text())
    end_s = time.monotonic() + 30
    while is_alive(evaluator) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not is_alive(evaluator)  # it does not outlive the search
    result = invoke(folder, script, "--trials", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert [one["score"] for one in json.loads(result.stdout)["trials"]] == [1, 3, 4]


def test_commands_that_fail(folder: Path) -> None:
    """Whatever they started is gone with them."""
    hangs = Command(
        command(
            folder,
            "import subprocess, sys, time\n"
            "subprocess.Popen(['sh', '-c', 'sleep 3; touch \"$0\"', __file__ + '.left'])\n"
            "time.sleep(60)",
        ),
        1.0,
    )
    with pytest.raises(Failed, match="it took more than 1 s"):
        hangs("model")
    with pytest.raises(Failed, match="it ended with status 3"):
        Command(command(folder, "raise SystemExit(3)"), 60)("model")
    with pytest.raises(Failed, match="cannot be started"):
        Command("/nowhere/to/be/found {model}", 60)("model")
    time.sleep(3)
    assert not (folder / "evaluate.py.left").exists()


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("", "no JSON"),
        ("1.5\nwords", "no JSON"),
        ("[1]", "no number `score`"),
        ('{"score": "1"}', "no number `score`"),
        ('{"score": true}', "no number `score`"),
        (200_000 * "[", "nested too deeply"),
        (f'{{"score": 1, "x": {40 * "["}{40 * "]"}}}', "nested too deeply"),
        ("null", "no number `score`"),
        ("NaN", "its score is nan"),
        ('{"score": -Infinity}', "its score is -inf"),
        ("1" + 400 * "0", "its score is inf"),
    ],
)
def test_what_is_no_score(printed: str, reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        evaluation(printed)


def test_what_is_a_score() -> None:
    assert evaluation("words\n0.5\n\n") == Evaluation(0.5, {})
    assert evaluation('{"score": 2, "loss": 3}\r\n') == Evaluation(2.0, {"loss": 3})


def test_another_backbone(folder: Path) -> None:
    """Is refused before the first trial, as by a merge."""
    other = {NAME: tensor(np.random.default_rng(7).normal(0, 0.05, (16, 24)), "F32")}
    shutil.rmtree(folder / "expert1")
    save_checkpoint(folder / "expert1", other)
    result = invoke(folder, SCRIPT, "--trials", 1)
    assert_paragraph(result, 2, "expert1", "backbone", "--allow-mismatch")
    assert not (folder / "count").exists()
    allowed = invoke(folder, SCRIPT, "--trials", 1, "--allow-mismatch", "--json")
    assert json.loads(allowed.stdout)["score"] == 1


def test_something_else_in_the_output(folder: Path) -> None:
    """Is not what a search overwrites, nor finds out at its end."""
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("mine")
    result = invoke(folder, SCRIPT, "--trials", 1)
    assert_paragraph(result, 2, "is there already, and not by this search")
    assert not (folder / "count").exists()


def test_a_damaged_record_of_trials(folder: Path) -> None:
    run(folder, "out", nearness(folder), 2)
    record = folder / "out" / "della_search.json"
    whole = json.loads(record.read_text())
    words = ["report", str(folder / "out"), "--to", str(folder / "page.html")]
    lacking = [{key: whole[key] for key in whole if key != lost} for lost in ("labels", "first")]
    wrong: list[dict[str, Any]] = [
        {"score": "high"},
        {"first": "low"},
        {"labels": list(whole["labels"])},
        {"held_out": ["base"]},
        {"held_out": {"base": {"math": "good"}}},
        {"trials": [{**whole["trials"][0], "score": "high"}]},
        {"trials": [{**whole["trials"][0], "seconds": None}]},
    ]
    lacking += [{**whole, **part} for part in wrong]
    deep = 200_000 * "["
    for damaged in (record.read_text()[:-9], "[]", deep, *map(json.dumps, lacking)):
        record.write_text(damaged)
        assert_paragraph(CliRunner().invoke(main, words), 2, "della_search.json is damaged")
    # Merged anew without a search, it is nobody's.
    record.write_text(json.dumps({**whole, "model_digest": "another"}))
    assert CliRunner().invoke(main, words).exit_code == 0
    assert "Score of each trial" not in (folder / "page.html").read_text()


def test_the_output_is_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    space = open_space(folder / "space.yaml", auto=False)
    found = search(space, ".", ByValues(), Effort(1), options=RunOptions(check=False))
    assert verify(str(folder / "here")).model_digest == found.model_digest
    assert (folder / "here.search" / "best.yaml").exists()


def test_what_is_refused(folder: Path) -> None:
    space = str(folder / "space.yaml")
    for words, said in (
        ([space, "out", "--evaluate", "true"], "does not say where the model goes"),
        ([space, "out", "--evaluate", "'{model}"], "is no command"),
        ([space, "s3://b/out", "--evaluate", "true {model}"], "is remote"),
        ([space, "/", "--evaluate", "true {model}"], "keeps its trials beside it"),
    ):
        assert_paragraph(CliRunner().invoke(main, ["search", *words]), 2, said)
    with pytest.raises(ConfigError, match="--trials is 0"):
        run(folder, "out", nearness(folder), 0)
    assert not (folder / "out.search").exists()
