"""The methods of the papers once more, dense and slow, in double precision: what the fast ones are held against."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]


def cosines(left: Rows, right: Rows) -> Rows:
    return left @ right.T / np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))


def cdpruner(vision: Rows, text: Rows, num_picks: int, may: list[int]) -> list[int]:
    """Every candidate's whole determinant is computed anew."""
    relevance = np.ones(len(vision))
    if len(text):
        relevance = cosines(vision, text.mean(axis=0, keepdims=True))[:, 0]
        low, high = relevance[may].min(), relevance[may].max()
        relevance = (relevance - low + 1e-6) / (high - low + 1e-6)
    similarity = cosines(vision, vision)
    np.fill_diagonal(similarity, 1)
    kernel = relevance[:, None] * similarity * relevance
    picked: list[int] = []
    for _ in range(num_picks):
        picked.append(
            max(sorted(set(may) - set(picked)), key=lambda i: np.linalg.det(kernel[np.ix_([*picked, i], [*picked, i])]))
        )
    return picked


def otprune(vision: Rows, num_picks: int, may: list[int], gamma: float = 0.01) -> list[int]:
    """The objective over features, as before the paper turns it into one over tokens."""
    tokens = vision[may] / np.linalg.norm(vision[may], axis=0)
    values, vectors = np.linalg.eigh(tokens.T @ tokens)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    picked: list[int] = []

    def objective(places: list[int]) -> float:
        covariance = tokens[places].T @ tokens[places]
        return float(np.linalg.slogdet(np.eye(len(root)) + gamma * root @ covariance @ root)[1])

    for _ in range(num_picks):
        picked.append(max(sorted(set(range(len(may))) - set(picked)), key=lambda i: objective([*picked, i])))
    return [may[place] for place in picked]


def scope(keys: Rows, attention: Rows | None, num_picks: int, may: list[int]) -> list[int]:
    similarity = cosines(keys, keys)

    def coverage(tokens: list[int]) -> float:
        return sum(max(0.0, *(similarity[of, by] for by in tokens)) for of in may) if tokens else 0.0

    picked: list[int] = []
    for _ in range(num_picks):
        before = coverage(picked)
        gains = {i: coverage([*picked, i]) - before for i in may if i not in picked}
        picked.append(max(gains, key=lambda i: gains[i] * (1.0 if attention is None else attention[i])))
    return picked


def dart(vision: Rows, text: Rows, num_picks: int, may: list[int]) -> list[int]:
    def length(rows: Rows, index: int) -> float:
        return float(sum(abs(value) for value in rows[index]))

    picked = sorted(may, key=lambda i: -length(vision, i))[:4][:num_picks]
    words = sorted(range(len(text)), key=lambda i: -length(text, i))[:4]
    pivots = [*vision[picked], *text[words]]
    for done, pivot in enumerate(pivots):
        share = int(np.ceil((num_picks - len(picked)) / (len(pivots) - done)))
        duplication = cosines(vision, pivot[None])[:, 0]
        picked += sorted(set(may) - set(picked), key=lambda i: float(duplication[i]))[:share]
    return picked


def apet(keys: Rows, num_picks: int, may: list[int]) -> list[int]:
    basis = [may[0]]
    while len(basis) < min(10, num_picks):
        basis.append(
            max(sorted(set(may) - set(basis)), key=lambda i: min(np.linalg.norm(keys[i] - keys[j]) for j in basis))
        )
    errors = {}
    for i in set(may) - set(basis):
        weights = np.linalg.lstsq(keys[basis].T, keys[i], rcond=None)[0]
        errors[i] = float(np.linalg.norm(keys[i] - weights @ keys[basis]))
    return basis + sorted(errors, key=lambda i: -errors[i])[: num_picks - len(basis)]


def best_determinant(kernel: Rows, size: int) -> float:
    """The largest determinant of any `size` rows and columns, by trying all."""
    return max(float(np.linalg.det(kernel[np.ix_(some, some)])) for some in combinations(range(len(kernel)), size))


def evs(vision: Rows, num_frames: int, num_picks: int) -> list[int]:
    """The first frame, then the tokens least like those of the same place one frame before."""
    size = len(vision) // num_frames
    changes = {token: 1 - cosines(vision[[token]], vision[[token - size]])[0, 0] for token in range(size, len(vision))}
    return [*range(size), *sorted(changes, key=lambda token: (-changes[token], token))][:num_picks]


def whole_frames(num_tokens: int, num_frames: int, num_picks: int) -> list[int]:
    """Frames as far apart as they can be, all tokens of each but the last."""
    size = num_tokens // num_frames
    num_taken = -(-num_picks // size)
    picked: list[int] = []
    for place in range(num_taken):
        frame = place * (num_frames - 1) // max(num_taken - 1, 1)
        room = min(size, num_picks - len(picked))
        picked += [frame * size + number * (size - 1) // max(room - 1, 1) for number in range(room)]
    return picked
