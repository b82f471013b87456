"""Where two sequences first differ, against the definition, and everything that must be refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from prefkern import first_divergence, reference

OPS = torch.ops.prefkern
only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def test_worked(device):
    a = torch.tensor([[7, 8, 3, 4, 2], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 2, 3, 4, 5]], device=device)
    b = torch.tensor([[7, 8, 5, 2], [1, 2, 3, 4], [1, 2, 3, 0], [1, 2, 3, 4]], device=device)
    assert first_divergence(a, b).tolist() == [2, 4, 3, 0]
    assert first_divergence(a, a).tolist() == [5] * 4  # equal: the length
    assert first_divergence(
        a, b, mask_b=torch.arange(4, device=device) < torch.tensor([[4], [2], [4], [4]], device=device)
    ).tolist() == [2, 2, 3, 0]
    assert first_divergence(a.int(), b.int()).tolist() == [2, 4, 3, 0]
    assert first_divergence(a[:, :0], b).tolist() == [0] * 4
    out = first_divergence(a[:0], b[:0])
    assert out.shape == (0,) and out.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", ["padded", "masked", "packed", "mixed"])
def test_against_the_definition(device, dtype, layout):
    """Differences everywhere around a step of 64 and a tile of 512 tokens, and none."""
    places = [0, 1, 63, 64, 65, 127, 128, 511, 512, 513, 700, None]
    a = torch.randint(-(2**31), 2**31 - 1, (len(places), 900), device=device).to(dtype)
    b = a.clone()
    for row, place in enumerate(places):
        if place is not None:
            b[row, place] += 1
            b[row, place + 1 :: 3] -= 1
    lengths = torch.tensor([900, 1, 63, 300, 0, 900, 128, 512, 513, 513, 850, 900], device=device)
    options = {}
    if layout == "masked":
        options["mask_a"] = torch.arange(900, device=device) < lengths[:, None]
        options["mask_b"] = torch.arange(900, device=device) < lengths.flip(0)[:, None]
        a = a.masked_fill(~options["mask_a"], 5)
    if layout in ("packed", "mixed"):
        options["cu_seqlens_a"] = boundaries(lengths.tolist(), device)
        a = a[torch.arange(900, device=device) < lengths[:, None]]
    if layout == "packed":
        options["cu_seqlens_b"] = boundaries([900] * len(places), device)
        b = b.view(-1)
    out = first_divergence(a, b, **options)
    expected = reference.first_divergence(a.cpu(), b.cpu(), **{name: t.cpu() for name, t in options.items()})
    assert torch.equal(out.cpu(), expected)


@given(st.lists(st.integers(0, 2), max_size=70), st.lists(st.integers(0, 2), max_size=70))
def test_a_common_prefix(a, b):
    k = first_divergence(torch.tensor([a], dtype=torch.int64), torch.tensor([b], dtype=torch.int64)).item()
    assert a[:k] == b[:k]
    assert k == min(len(a), len(b)) or a[k] != b[k]
    assert k == first_divergence(torch.tensor([b], dtype=torch.int64), torch.tensor([a], dtype=torch.int64)).item()


def test_any_number_of_threads(threads):
    a = torch.zeros(50, 5000, dtype=torch.int64)
    b = a.clone()
    b[torch.arange(50), torch.arange(50) * 90] = 1
    for n in (1, 2):
        threads(n)
        assert first_divergence(a, b).tolist() == [90 * k for k in range(50)]


def test_opcheck(device):
    a, b = torch.randint(0, 2, (3, 8), device=device), torch.randint(0, 2, (3, 6), device=device)
    mask = torch.ones_like(b).bool()
    opcheck(OPS.first_divergence.default, (a, b, None, mask, None, None))
    opcheck(OPS.first_divergence.default, (a.view(-1), b, None, None, boundaries([20, 0, 4], device), None))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_tokens(device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda a, b: first_divergence(a, b) + 1, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows, columns in ((4, 7), (5, 12), (6, 30), (7, 31)):
        a, b = torch.randint(0, 2, (rows, columns), device=device), torch.randint(0, 2, (rows, columns + 3), device=device)
        assert torch.equal(run(a, b), first_divergence(a, b) + 1)
    assert counter.frame_count <= 2


def test_meta_tensors():
    a = torch.empty(3, 5, dtype=torch.int32, device="meta")
    out = first_divergence(a, a)
    assert out.shape == (3,) and out.dtype == torch.int64 and out.device.type == "meta"


A, M = torch.zeros(2, 3).long(), torch.ones(2, 3).bool()
HOLE = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
ERRORS = {
    "list": (dict(ids_a=[[1]]), TypeError, r"ids_a is a list; a torch\.Tensor"),
    "float": (dict(ids_b=A.float()), TypeError, r"ids_b has dtype Float; accepted: int64, int32"),
    "two dtypes": (dict(ids_b=A.int()), TypeError, r"ids_b has dtype Int; that of ids_a, Long, is expected"),
    "rows": (dict(ids_b=A[:1]), ValueError, r"ids_b has 1 sequences; ids_a has 2"),
    "1-d": (dict(ids_b=A[0]), ValueError, r"ids_b has shape \[3\]; expected \[B, T\], or \[N\] with cu_seqlens_b"),
    "device": (dict(ids_b=A.to("meta")), ValueError, r"ids_b is on meta but ids_a is on cpu"),
    "mask hole": (dict(mask_a=HOLE), ValueError, r"mask_a of row 1 has a token that counts behind one that does not"),
    "other mask hole": (dict(mask_a=M, mask_b=~HOLE), ValueError, r"mask_b of row 1 has a token that counts"),
    "mask shape": (dict(mask_b=M[:, :2]), ValueError, r"mask_b has shape \[2, 2\]; ids_b has shape \[2, 3\]"),
    "mask int": (dict(mask_a=A), TypeError, r"mask_a has dtype Long; accepted: bool"),
    "mask list": (dict(mask_b=[[True]]), TypeError, r"mask_b is a list"),
    "cu padded": (dict(cu_seqlens_a=boundaries([3, 3])), ValueError, r"ids_a has shape \[2, 3\]; with cu_seqlens_a \[N\]"),
    "cu end": (
        dict(ids_b=A.view(-1), cu_seqlens_b=boundaries([3, 2])), ValueError, r"cu_seqlens_b ends at 5; ids_b has 6 tokens"
    ),
    "cu int64": (dict(ids_b=A.view(-1), cu_seqlens_b=boundaries([3, 3]).long()), TypeError, r"cu_seqlens_b has dtype Long"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(wrong, error, message):
    with pytest.raises(error, match=message):
        first_divergence(**{"ids_a": A, "ids_b": A, **wrong})


@only_cuda
def test_what_is_wrong_is_minus_one(device, validation):
    a = torch.zeros(2, 3, device=device).long()
    assert first_divergence(a, a, HOLE.to(device)).tolist() == [3, -1]
    cu = torch.tensor([0, 7, 6], dtype=torch.int32, device=device)
    assert first_divergence(a.view(-1), a, cu_seqlens_a=cu).tolist() == [-1, -1]
    validation(True)
    with pytest.raises(ValueError, match=r"mask_b of row 1"):
        first_divergence(a, a, None, HOLE.to(device))
    with pytest.raises(ValueError, match=r"cu_seqlens_a is \["):
        first_divergence(a.view(-1), a, cu_seqlens_a=cu)
