"""The bodies of answers, put where they are wanted."""

from __future__ import annotations

import http.client
from typing import Any


def read_into(response: Any, into: memoryview) -> int:  # noqa: ANN401
    """Fill `into` with the body of an answer of urllib3; return how much there was.

    The connection is free for others then; otherwise whoever asked closes it.
    """
    # Of urllib3's layers one copies and none is needed: ranges are sent as they are.
    plain = getattr(response, "_fp", None)
    if not isinstance(plain, http.client.HTTPResponse):
        plain = response
    done = 0
    while done < len(into) and (count := plain.readinto(into[done:])):
        done += count
    if done == len(into):
        response.release_conn()
    return done
