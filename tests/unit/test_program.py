"""What the command line does to its process."""

from __future__ import annotations

import threading

import pytest

from della_dist import program
from della_dist.cli import main


def test_only_watchers_of_closed_channels_die_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(str(args.exc_value)))
    program._let_watchers_die.__wrapped__()

    def die(text: str) -> None:
        raise ValueError(text)

    for text in ("Cannot monitor channel state: Channel closed!", "something else"):
        thread = threading.Thread(target=die, args=[text])
        thread.start()
        thread.join()
    assert said == ["something else"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("della-dist me", ["merge"]),
        ("della-dist merge --thr", ["--threads"]),
        ("della-dist merge --device c", ["cpu", "cuda"]),
    ],
)
def test_completion(
    words: str,
    found: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("_DELLA_DIST_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit) as ended:
        main(prog_name="della-dist")
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [f"plain,{word}" for word in found]
