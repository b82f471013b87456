"""The CUDA kernel of csrc/diversity, compiled for the CPU by tests/simt: the same sets as the CPU's, from the same bits."""

from __future__ import annotations

import pytest
import torch

from prefkern import _C
from simt.harness import NAN, launches, pointer, same_bits_in_every_order

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def greedy_select(module, emb, types, seeds, quotas, *, size, maximum=False, launch="cuda_greedy_select"):
    """The chosen and the scores that were left, by `module`: the emulator's, or the library's own on the CPU."""
    q, k = len(seeds), emb.shape[-2]
    args = module.GreedyArgs()
    args.seeds, args.candidates, args.width, args.types, args.size = q, k, emb.shape[-1], quotas.shape[-1], size
    args.maximum, args.dtype = maximum, getattr(module.DType, DTYPES[emb.dtype])
    args.own_embeddings, args.own_types, args.own_quotas = emb.dim() == 3, types.dim() == 2, quotas.dim() == 2
    held = emb.contiguous(), types.contiguous(), seeds.contiguous(), quotas.contiguous()
    args.embeddings, args.type_id, args.seed, args.quotas = map(pointer, held)
    norms, scores = torch.full((q if emb.dim() == 3 else 1, k), 7.0), torch.full((q, k), 7.0)
    chosen = torch.full((q, size), -7, dtype=torch.int64)
    args.inverse_norms, args.scores, args.chosen = map(pointer, (norms, scores, chosen))
    for name in (launch,) if isinstance(launch, str) else launch:
        getattr(module, name)(args)
    return {"chosen": chosen, "scores": scores, "norms": norms}


def on_cpu(*arguments, **options):
    return greedy_select(_C, *arguments, launch=("cpu_greedy_norms", "cpu_greedy_select"), **options)


def instance(q, k, d, c, dtype):
    generator = torch.Generator().manual_seed(k)
    emb = torch.randn(q, k, d, generator=generator).to(dtype)
    types = torch.arange(q * k).view(q, k) % c
    seeds = torch.randint(k, (q,), generator=generator)
    quotas = torch.full((q, c), max(1, k // (2 * c)))
    quotas[0] = 1
    return emb, types, seeds, quotas


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize(("q", "k", "d", "c"), [(1, 1, 1, 1), (3, 9, 31, 2), (2, 40, 33, 3), (2, 21, 100, 1)])
def test_the_bits_of_the_cpu(simt, dtype, maximum, q, k, d, c):
    arguments = instance(q, k, d, c, dtype)
    size = int(arguments[3].sum(1).max()) + 1
    out = same_bits_in_every_order(simt, lambda: greedy_select(simt, *arguments, size=size, maximum=maximum))
    expected = on_cpu(*arguments, size=size, maximum=maximum)
    for name in ("chosen", "norms", "scores"):
        assert torch.equal(out[name], expected[name]), name


def test_shared_embeddings_and_ties(simt):
    """Copies of four vectors: of equal scores the first, across warps."""
    emb = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).repeat(9, 1)
    arguments = emb, torch.zeros(36, dtype=torch.int64), torch.tensor([5, 0, 35]), torch.tensor([20])
    out = same_bits_in_every_order(simt, lambda: greedy_select(simt, *arguments, size=20))
    assert torch.equal(out["chosen"], on_cpu(*arguments, size=20)["chosen"])
    for row in out["chosen"].tolist():
        for residue in range(4):
            mine = [i for i in row[1:] if i % 4 == residue]
            assert mine == sorted(mine) and len(row) == len(set(row))


def test_worked(simt):
    emb = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [-1, 0.1], [0.6, -0.8]])
    arguments = emb, torch.tensor([1, 0, 1, 0, 1, 0]), torch.tensor([0]), torch.tensor([2, 2])
    assert greedy_select(simt, *arguments, size=4)["chosen"].tolist() == [[0, 4, 1, 5]]
    assert greedy_select(simt, *arguments, size=5, maximum=True)["chosen"].tolist() == [[0, 4, 5, 3, -1]]


def test_what_cannot_be_is_minus_one(simt):
    """Row by row: the others come out as they would alone."""
    emb, types, seeds, quotas = instance(11, 20, 10, 2, torch.float32)
    quotas[:] = torch.tensor([4, 4])
    emb[1, 7], emb[2, 3, 1], emb[3, 0], emb[4, 9] = 0, NAN, 1e38, 1e-38
    seeds[5], seeds[6] = 20, -1
    quotas[7, 1], quotas[8] = -1, torch.tensor([11, 1])
    types[9, 4] = 2
    quotas[10] = torch.tensor([1, 0])
    types[10, seeds[10]] = 1
    out = same_bits_in_every_order(simt, lambda: greedy_select(simt, emb, types, seeds, quotas, size=12)["chosen"])
    assert out[1:].eq(-1).all()
    assert torch.equal(out[:1], on_cpu(emb[:1], types[:1], seeds[:1], quotas[:1], size=12)["chosen"])
    assert greedy_select(simt, emb[:1], types[:1], seeds[:1], quotas[:1], size=7)["chosen"].eq(-1).all()  # no room for eight


def test_two_launches_and_none_without_seeds(simt):
    arguments = instance(2, 9, 4, 1, torch.float32)
    assert launches(simt, lambda: greedy_select(simt, *arguments, size=4)) == 2
    none = arguments[0][:0], arguments[1][:0], arguments[2][:0], arguments[3][:0]
    assert launches(simt, lambda: greedy_select(simt, *none, size=4)) == 0
