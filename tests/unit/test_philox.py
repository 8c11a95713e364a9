"""The random words: Random123's known answers, and our own layout's published ones."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from della_dist.ops.cpu.band import CHUNK_ELEMENTS, random_words
from della_dist.ops.philox import element_uniforms, element_words, philox4x32, stream_key
from della_dist.ops.reference import uniforms

#: kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

#: Seed, stage, expert, tensor, element, key, word, u: the table in the README, and stages.
PUBLISHED = (
    (0, 0, 0, "model.embed_tokens.weight", 0, 0x51735C4314432339, 0xAE15FEA8, 0.6800230741500854),
    (0, 0, 0, "model.embed_tokens.weight", 5, 0x51735C4314432339, 0x242A46BA, 0.14127004146575928),
    (0, 0, 1, "model.embed_tokens.weight", 0, 0xBF692931DBF9B19F, 0xE11AC823, 0.8793148994445801),
    (42, 0, 2, "lm_head.weight", 68719476743, 0x4C3F7233089CD7FD, 0x895AB8D8, 0.5365405082702637),
    (0, 1, 0, "model.embed_tokens.weight", 0, 0x96E75A0781F76D8A, 0x60EC9B61, 0.3786103129386902),
    (42, 3, 2, "lm_head.weight", 68719476743, 0xEC714E467EEE55F1, 0x17855E0D, 0.09187877178192139),
)


@numba.njit
def kernel_words(key, start, n, pairs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    skip = random_words(np.uint64(key), start, n, pairs)
    return pairs.view(np.uint32)[skip : skip + n].copy()


def numba_words(key: int, start: int, stop: int) -> list[int]:
    """Return the kernel's words, made `CHUNK_ELEMENTS` at a time as the kernels do."""
    pairs = np.zeros(CHUNK_ELEMENTS // 2 + 4, np.uint64)
    words: list[int] = []
    for first in range(start, stop, CHUNK_ELEMENTS):
        n = min(CHUNK_ELEMENTS, stop - first)
        words += kernel_words(np.uint64(key), first, n, pairs).tolist()
    return words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32([[x, x] for x in counter], key).T.tolist() == [list(words)] * 2


@pytest.mark.parametrize(
    ("seed", "stage", "expert", "name", "element", "key", "word", "u"), PUBLISHED
)
def test_published_words(
    seed: int, stage: int, expert: int, name: str, element: int, key: int, word: int, u: float
) -> None:
    assert stream_key(seed, name, expert, stage) == key
    if element < 8:
        assert uniforms(seed, name, expert, 8, stage)[element] == u
    assert element_words(key, element, element + 1).tolist() == [word]
    assert element_uniforms(key, element, element + 1).tolist() == [u]
    assert numba_words(key, element, element + 1) == [word]


def test_key_separates_seed_tensor_expert_and_stage() -> None:
    keys = {
        stream_key(seed, name, expert, stage)
        for seed in (0, 1, 2**64 - 1)
        for name in ("", "a", "é", "\0\0\0\0a")
        for expert in (0, 1)
        for stage in (0, 1, 2**32 - 1)
    }
    assert len(keys) == 3 * 4 * 2 * 3


def test_kernel_starts_anywhere() -> None:
    key = stream_key(3, "w", 0)
    whole = element_words(key, 0, 3001).tolist()
    for start, stop in ((0, 3001), (1, 2), (2, 9), (3, 3000), (1021, 1030), (7, 7)):
        assert numba_words(key, start, stop) == whole[start:stop]
        assert element_words(key, start, stop).tolist() == whole[start:stop]
    # The second word of the counter is used from element 2**34 on.
    for start in (2**34 - 3, 2**36 - 5):
        assert numba_words(key, start, start + 40) == element_words(key, start, start + 40).tolist()


def test_uniforms_are_uniform() -> None:
    u = element_uniforms(stream_key(0, "w", 0), 5, 200_005).astype(np.float64)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(u.var() - 1 / 12) < 0.001
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
