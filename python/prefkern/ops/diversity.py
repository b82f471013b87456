"""How much the responses to a prompt differ, and sets of candidates that are unlike each other. Kernels: ``csrc/diversity``;
formulas: ``csrc/math/diversity.h``."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, integer, number, same_device
from ._call import call, validation

_OPS = torch.ops.prefkern
_self_bleu, _distinct, _edit = _OPS.self_bleu.default, _OPS.distinct_n.default, _OPS.edit_distance.default
_greedy = _OPS.greedy_select.default

REDUCES = ("min", "max")


def self_bleu(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_prompts: Tensor | None = None,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    smoothing: float = 0.1,
) -> Tensor:
    r"""How alike the responses to each prompt are: the mean BLEU of one response against all others, from 0 to 1.

    Of a response with :math:`l_n` n-grams, each of them matched as often as it comes in that other response in which it comes
    most, :math:`m_n` matches in all:

    .. math::
        \mathrm{BLEU} = b \exp \sum_n w_n \log p_n, \qquad p_n = \frac{m_n}{\max(1, l_n)}

    with ``smoothing`` in place of :math:`m_n = 0`; without a single token matched BLEU is 0. b is 1 for a response longer than
    r, else :math:`e^{1 - r / \mathrm{length}}`; r is the length of the other response nearest in length, of two the shorter.
    This is NLTK's sentence_bleu with its first smoothing, in the terms in which MMR1 uses it. N-grams are compared, not
    their hashes alone.

    Args:
        ids: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``: B responses, those of a prompt one behind the other. int64 or
            int32, any values, on the CPU.
        mask: bool, shaped like ``ids``; True counts. What lies outside is left out before n-grams are formed. None: every token
            counts, padding too.
        cu_seqlens: int32 ``[B + 1]``, where packed responses begin and end.
        cu_prompts: int32 ``[P + 1]``: prompt p has the responses ``cu_prompts[p]`` to ``cu_prompts[p + 1] - 1``, any number of
            them. None: all are of one prompt.
        weights: of the orders 1, 2, ...; finite, not negative. An order of weight 0 is not looked at, but for a match of
            tokens.
        smoothing: finite, not negative.

    Returns:
        float64 ``[P]``; NaN for a prompt with fewer than two responses, of which there is nothing to compare. Time is linear in
        the tokens, whatever the number of responses; prompts are shared out over torch's threads, and the bits do not depend on
        how many there are. No gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; for tensors on CUDA as well.
    """
    _check(ids, mask, cu_seqlens, cu_prompts)
    if isinstance(weights, (str, Tensor)) or not isinstance(weights, Sequence):
        raise TypeError(f"weights is a {type(weights).__name__}; a sequence of numbers, one per order, is expected")
    w = torch.tensor([number("weights", weight) for weight in weights], dtype=torch.float64, device="cpu")
    return call(_self_bleu, ids, mask, cu_seqlens, cu_prompts, w, number("smoothing", smoothing))


def distinct_n(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_prompts: Tensor | None = None,
    n: int = 3,
) -> Tensor:
    """How many n-grams of a prompt's responses are different, over how many there are: from nearly 0 to 1.

    Args:
        ids, mask, cu_seqlens, cu_prompts: as for :func:`self_bleu`.
        n: positive.

    Returns:
        float64 ``[P]``; 0 for a prompt without an n-gram. No gradient.

    Raises:
        ValueError, TypeError: as :func:`self_bleu`.
    """
    _check(ids, mask, cu_seqlens, cu_prompts)
    return call(_distinct, ids, mask, cu_seqlens, cu_prompts, integer("n", n))


def edit_distance(
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_prompts: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """The edit distance (Levenshtein) between two responses to a prompt, in tokens, averaged over its pairs of responses.

    Args:
        ids, mask, cu_seqlens, cu_prompts: as for :func:`self_bleu`.
        normalize: divide each pair's distance by the length of its longer response: from 0 to 1. Two empty responses have 0.

    Returns:
        float64 ``[P]``; NaN for a prompt with fewer than two responses. A pair of m and n tokens takes time in m n / 64 and
        memory in m + n (Myers' bit-parallel algorithm). No gradient.

    Raises:
        ValueError, TypeError: as :func:`self_bleu`.
    """
    _check(ids, mask, cu_seqlens, cu_prompts)
    return call(_edit, ids, mask, cu_seqlens, cu_prompts, bool(normalize))


def greedy_select(
    emb: Tensor,
    type_id: Tensor,
    seeds: Tensor,
    quotas: Sequence[int] | Tensor,
    *,
    reduce: Literal["min", "max"] = "min",
    size: int | None = None,
) -> Tensor:
    r"""For each of Q seeds a set of candidates that are unlike each other, of each type as many as its quota.

    The seed comes first, and counts as one of its type. Then, until the quotas are met, the candidate j with the lowest score
    among those whose type has room, of equal ones the lowest j:

    .. math:: s_j = \min_{i \in S} \cos(e_i, e_j) \quad (\texttt{"min"}), \qquad s_j = \max_{i \in S} \cos(e_i, e_j)
        \quad (\texttt{"max"})

    ``"max"`` is farthest-point selection: the next one is unlike all that were chosen. ``"min"`` is what UltraGen's code does:
    it is unlike any one of them, and may be a near copy of another.

    Args:
        emb: the candidates, ``[Q, K, d]``, or ``[K, d]`` for all seeds. float32, bfloat16 or float16 (float64 on the CPU). No
            norm may be outside [1e-30, 1e30].
        type_id: ``[Q, K]``, or ``[K]`` for all seeds, int64 or int32: from 0 to C - 1.
        seeds: ``[Q]`` int64 or int32, which candidate each set begins with.
        quotas: how many of each type: C numbers (at most 256), or an integer tensor ``[C]``, or ``[Q, C]`` for sets of
            different sizes.
        size: how many columns the result has. None: as many as the largest set. It must be given with quotas that are a tensor
            on CUDA, which would have to be waited for, and, for a graph without a break, wherever they are a tensor.

    Returns:
        int64 ``[Q, size]``: candidates in the order in which they were chosen, -1 behind a set's last. Memory beyond the
        embeddings is O(Q K): no matrix of cosines. Cosines are float32 (float64 for float64), added up in one order everywhere:
        the CPU, with any instruction set and number of threads, and CUDA choose the same. No gradient.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A quota above what there is of its type, or
            of 0 for the seed's, a type or seed out of range, and a vector without a direction are always found on the CPU; on
            CUDA the seed's row is -1 all over, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(emb=emb, type_id=type_id, seeds=seeds)
    maximum = choice("reduce", reduce, REDUCES) == 1
    if isinstance(quotas, Tensor):
        if size is None and quotas.is_cuda:
            raise ValueError("size is None; with quotas on CUDA it must be given: to read them is to wait for the device")
        wanted = quotas
    elif isinstance(quotas, (str, bytes)) or not isinstance(quotas, Sequence):
        raise TypeError(f"quotas is a {type(quotas).__name__}; a sequence of integers or an integer tensor is expected")
    else:
        numbers = [integer("quotas", quota) for quota in quotas]
        size = max(0, sum(numbers)) if size is None else size  # a negative quota is for the op to refuse
        wanted = torch.tensor(numbers, dtype=torch.int64, device=emb.device)
    if size is None:
        size = _largest(wanted)
    if emb.requires_grad:
        emb = emb.detach()
    size = integer("size", size)
    if emb.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_sets(emb, type_id, seeds, wanted, size)
    return call(_greedy, emb, type_id, seeds, wanted, size, maximum)


def _largest(quotas: Tensor) -> int:
    if quotas.dim() == 0 or quotas.is_floating_point():  # the op refuses it
        return 0
    return max(0, int(quotas.sum(-1).max())) if quotas.numel() else 0


def _check(ids: Any, mask: Any, cu_seqlens: Any, cu_prompts: Any) -> None:
    check_tensors(ids=ids)
    given = {"mask": mask, "cu_seqlens": cu_seqlens, "cu_prompts": cu_prompts}
    check_tensors(**{name: t for name, t in given.items() if t is not None})


def _validate_sets(emb: Tensor, type_id: Tensor, seeds: Tensor, quotas: Tensor, size: int) -> None:
    """The op on the CPU looks at everything. Waits for the device."""
    call(_greedy, emb.cpu(), type_id.cpu(), seeds.cpu(), quotas.cpu(), size, False)


# ---- fake implementations --------------------------------------------------------------------------------------------


def _fake_prompts(ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cu_prompts: Tensor | None) -> Tensor:
    same_device("ids", ids, mask=mask, cu_seqlens=cu_seqlens, cu_prompts=cu_prompts)
    expected = 2 if cu_seqlens is None else 1
    torch._check(ids.dim() == expected, lambda: f"ids has shape {list(ids.shape)}; expected [B, T], or [N] with cu_seqlens")
    torch._check(mask is None or mask.dim() == ids.dim(), lambda: "mask must be shaped like ids")
    return ids.new_empty((1 if cu_prompts is None else cu_prompts.shape[0] - 1,), dtype=torch.float64)


@torch.library.register_fake("prefkern::self_bleu")
def _fake_self_bleu(
    ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cu_prompts: Tensor | None, weights: Tensor, smoothing: float
) -> Tensor:
    return _fake_prompts(ids, mask, cu_seqlens, cu_prompts)


@torch.library.register_fake("prefkern::distinct_n")
def _fake_distinct(ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cu_prompts: Tensor | None, n: int) -> Tensor:
    return _fake_prompts(ids, mask, cu_seqlens, cu_prompts)


@torch.library.register_fake("prefkern::edit_distance")
def _fake_edit(
    ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cu_prompts: Tensor | None, normalize: bool
) -> Tensor:
    return _fake_prompts(ids, mask, cu_seqlens, cu_prompts)


@torch.library.register_fake("prefkern::greedy_select")
def _fake_greedy(emb: Tensor, type_id: Tensor, seeds: Tensor, quotas: Tensor, size: int, maximum: bool) -> Tensor:
    same_device("emb", emb, type_id=type_id, seeds=seeds, quotas=quotas)
    torch._check(emb.dim() in (2, 3), lambda: f"emb has shape {list(emb.shape)}; expected [K, d], or [Q, K, d]")
    torch._check(seeds.dim() == 1, lambda: f"seeds has shape {list(seeds.shape)}; expected [Q]")
    return seeds.new_empty((seeds.shape[0], size), dtype=torch.int64)
