"""How much the responses to a prompt differ, and sets of candidates that are unlike each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

import torch
from torch import Tensor

from prefkern.reference._tokens import kept_tokens, rows_of_tokens

Token = int
REDUCES = ("min", "max")


def ngrams(tokens: Sequence[Token], n: int) -> list[tuple[Token, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def sentence_bleu(
    references: Sequence[Sequence[Token]], hypothesis: Sequence[Token], weights: Sequence[float], smoothing: float
) -> float:
    """As NLTK's, whose way it goes: the n-grams of every reference are counted anew for every hypothesis. `smoothing` is the
    number of matches where there are none."""
    logs = 0.0
    for n, weight in enumerate(weights, start=1):
        counts = Counter(ngrams(hypothesis, n))
        most: dict[tuple[Token, ...], int] = {}
        for reference in references:
            theirs = Counter(ngrams(reference, n))
            for gram in counts:
                most[gram] = max(most.get(gram, 0), theirs[gram])
        matched = sum(min(count, most[gram]) for gram, count in counts.items())
        if n == 1 and matched == 0:
            return 0.0
        if weight == 0:
            continue
        precision = (matched or smoothing) / max(1, sum(counts.values()))
        logs += weight * (math.log(precision) if precision > 0 else -math.inf)
    length = len(hypothesis)
    nearest = min((len(reference) for reference in references), key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > nearest else math.exp(1 - nearest / length)
    return brevity * math.exp(logs)


def self_bleu(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_prompts: Tensor | None = None,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    smoothing: float = 0.1,
) -> Tensor:
    """Mean BLEU of each response to a prompt against the others: float64 [P], NaN for fewer than two responses.

    Args:
        ids: integers [B, T], or packed [N] with `cu_seqlens`.
        mask: bool, shaped like `ids`; True counts.
        cu_seqlens: int32 [B + 1], where packed responses begin and end.
        cu_prompts: int32 [P + 1], where the responses of each prompt begin and end. None: all are of one prompt.
        weights: of the orders from 1 on.
        smoothing: what stands for zero matches.
    """
    result = []
    for responses in prompts_of(ids, mask, cu_seqlens, cu_prompts):
        scores = [
            sentence_bleu(responses[:k] + responses[k + 1 :], response, weights, smoothing)
            for k, response in enumerate(responses)
            if len(responses) > 1
        ]
        result.append(sum(scores) / len(scores) if scores else math.nan)
    return torch.tensor(result, dtype=torch.float64, device=ids.device)


def distinct_n(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_prompts: Tensor | None = None,
    n: int = 3,
) -> Tensor:
    """Different n-grams of a prompt's responses over all of them: float64 [P], 0 without any. Arguments as of `self_bleu`."""
    result = []
    for responses in prompts_of(ids, mask, cu_seqlens, cu_prompts):
        grams = [gram for response in responses for gram in ngrams(response, n)]
        result.append(len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(result, dtype=torch.float64, device=ids.device)


def levenshtein(a: Sequence[Token], b: Sequence[Token]) -> int:
    """Row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def edit_distance(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_prompts: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Mean edit distance of a prompt's pairs of responses: float64 [P], NaN for fewer than two responses.

    `normalize` divides each pair's by the length of its longer response; two empty ones have 0. Other arguments as of
    `self_bleu`.
    """
    result = []
    for responses in prompts_of(ids, mask, cu_seqlens, cu_prompts):
        distances = []
        for a, b in combinations(responses, 2):
            distance = levenshtein(a, b)
            distances.append(distance / max(1, len(a), len(b)) if normalize else distance)
        result.append(sum(distances) / len(distances) if distances else math.nan)
    return torch.tensor(result, dtype=torch.float64, device=ids.device)


def greedy_select(
    emb: Tensor,
    type_id: Tensor,
    seeds: Tensor,
    quotas: Sequence[int] | Tensor,
    *,
    reduce: Literal["min", "max"] = "min",
    size: int | None = None,
) -> Tensor:
    """For each seed a set of candidates, of each type as many as its quota: int64 [Q, size], -1 behind the last.

    The seed comes first, and counts. Then, again and again, the candidate of the lowest score among those whose type has room,
    of equal ones the first; a score is the least ("min") or the largest ("max") cosine with what has been chosen.

    Args:
        emb: [Q, K, d], or [K, d] for all seeds.
        type_id: integers from 0 on, [Q, K] or [K].
        seeds: integers [Q].
        quotas: [Q, C] or [C].
        size: columns of the result; None: as many as the largest set has.
    """
    if reduce not in REDUCES:
        raise ValueError(f"reduce: got {reduce!r}, accepted are {list(REDUCES)}")
    rows = len(seeds)
    unit = emb / emb.norm(dim=-1, keepdim=True)
    unit = unit.expand(rows, *unit.shape[-2:])
    types = type_id.expand(rows, type_id.shape[-1]).tolist()
    asked = torch.as_tensor(quotas)
    wanted = asked.expand(rows, asked.shape[-1]).tolist()
    sets = []
    for q, seed in enumerate(seeds.tolist()):
        room, chosen = list(wanted[q]), [seed]
        room[types[q][seed]] -= 1
        scores = unit[q] @ unit[q, seed]
        while any(room):
            left = [i for i in range(len(scores)) if i not in chosen and room[types[q][i]] > 0]
            _, last = min((float(scores[i]), i) for i in left)
            chosen.append(last)
            room[types[q][last]] -= 1
            fold = torch.minimum if reduce == "min" else torch.maximum
            scores = fold(scores, unit[q] @ unit[q, last])
        sets.append(chosen)
    size = max(map(len, sets), default=0) if size is None else size
    padded = [s + [-1] * (size - len(s)) for s in sets]
    return torch.tensor(padded, dtype=torch.int64, device=emb.device).reshape(rows, size)


def prompts_of(
    ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cu_prompts: Tensor | None
) -> list[list[list[Token]]]:
    """The tokens that count, of every response of every prompt."""
    row, rows = rows_of_tokens(ids, cu_seqlens, "ids")
    keep = kept_tokens(ids, mask)
    responses: list[list[Token]] = [[] for _ in range(rows)]
    for r, token in zip(row[keep].tolist(), ids.reshape(-1)[keep].tolist(), strict=True):
        responses[r].append(token)
    ends = [0, rows] if cu_prompts is None else cu_prompts.tolist()
    if ends[0] != 0 or ends[-1] != rows or ends != sorted(ends):
        raise ValueError(f"cu_prompts: must ascend from 0 to the {rows} responses, is {ends}")
    return [responses[a:b] for a, b in pairwise(ends)]
