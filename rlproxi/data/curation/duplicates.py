"""Duplicates: an exact search for images within a Hamming distance, and the choice of the copy that is kept.

The search (Manku, Jain & Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007) cuts 64 bits into B bands.
Hashes that differ in at most k bits agree on at least B - k whole bands. So for each choice of B - k bands, hashes that
agree on them are compared bit by bit, and no pair is missed.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from math import comb

import numpy as np

#: Pairs that are compared at once, which bounds the memory.
_CHUNK = 1 << 22


def bands(count: int, distance: int) -> int:
    """The number of bands with the least expected work for ``count`` random hashes."""

    def work(parts: int) -> float:
        bits = (parts - distance) * (64 // parts)
        return comb(parts, distance) * (count * 20.0 + count * count / 2.0 ** (bits + 1))

    return min(range(distance + 1, min(distance + 6, 64) + 1), key=work)


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of indices whose hashes differ in at most ``distance`` bits, int64 [P, 2], first < second, sorted.

    ``hashes``: uint64 [N], all different (equal ones would make N² pairs).
    """
    if distance == 0 or len(hashes) < 2:
        return np.zeros((0, 2), np.int64)
    parts = bands(len(hashes), distance)
    edges = np.linspace(0, 64, parts + 1).astype(int)
    masks = [((1 << (b - a)) - 1) << a for a, b in pairwise(edges)]
    found = [_agreeing(hashes, np.uint64(sum(chosen)), distance) for chosen in combinations(masks, parts - distance)]
    codes = np.unique(np.concatenate(found))
    return np.stack(np.divmod(codes, len(hashes)), 1)


def _agreeing(hashes: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """Pairs within ``distance`` that are equal under ``mask``, as codes first * N + second."""
    keys = hashes & mask
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    # Runs of equal keys: index i is compared with i + 1, i + 2, ... to the end of its run.
    left = np.flatnonzero(keys[1:] == keys[:-1])
    found, gap = [np.zeros(0, np.int64)], 1
    while len(left):
        for start in range(0, len(left), _CHUNK):
            part = left[start : start + _CHUNK]
            a, b = order[part], order[part + gap]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            first, second = np.minimum(a, b)[near], np.maximum(a, b)[near]
            found.append(first * len(hashes) + second)
        gap += 1
        left = left[left + gap < len(keys)]
        left = left[keys[left] == keys[left + gap]]
    return np.concatenate(found)


def duplicate_of(hashes: np.ndarray, pixels: np.ndarray, names: np.ndarray, distance: int) -> np.ndarray:
    """For each image the index of the kept image that it duplicates, or -1 if it is kept itself.

    Images are visited from the best to the worst: the largest first and, of equally large ones, the first by name. An
    image is kept unless one that is kept already is within ``distance``. So the order of the input does not matter.

    Args:
        hashes, pixels, names: [N] uint64; width x height; the rank of each image's name, all different.
    Returns:
        int64 [N].
    """
    order = np.lexsort((names, -pixels.astype(np.int64)))  # best first
    # Images with equal hashes have the same neighbours, so only the best of them is compared.
    unique, first, group = np.unique(hashes[order], return_index=True, return_inverse=True)
    rank = np.argsort(first, kind="stable")  # unique hashes, best image first
    place = np.empty(len(unique), np.int64)
    place[rank] = np.arange(len(unique))
    pairs = near_pairs(unique[rank], distance)
    kept_by = np.arange(len(unique))  # the first kept neighbour, or itself if it is kept
    for better, worse in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        # All images better than `worse` are decided by now, and the best of its neighbours comes first.
        if kept_by[worse] == worse and kept_by[better] == better:
            kept_by[worse] = better
    best = order[first[rank]]  # the best image of each hash, in that order
    answer = np.empty(len(hashes), np.int64)
    answer[order] = best[kept_by[place[group]]]
    answer[answer == np.arange(len(hashes))] = -1
    return answer
