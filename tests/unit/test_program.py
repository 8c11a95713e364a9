"""What the command line does to its process."""

from __future__ import annotations

import threading

import pytest

from della_dist import program


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
