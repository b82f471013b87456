"""The CUDA kernels of csrc/sequence, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import INF, NAN, close, pointer, same_bits, same_bits_in_every_order, tensor_like

LENGTHS = (0, 1, 0, 300, 3, 4, 5, 64, 127, 128, 129, 600, 0)
WRONG = [(0, 20, 10, 40), (1, 20, 40), (0, 20, 39), (0, 20, 41), (0, -5, 40), (0, 2**30, 40), (0, 2, 5, 30, 3, 4, 20, 40)]


def set_layout(layout, tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    layout.tokens = tokens.numel()
    layout.sequences = tokens.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    layout.padded_length = tokens.shape[1] if cu_seqlens is None else 0
    layout.cu_seqlens = pointer(cu_seqlens)
    return layout.sequences


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def sample(packed: bool, masked: bool, count: int) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """`count` token tensors with garbage outside the mask, the mask, and cu_seqlens."""
    shape = (sum(LENGTHS),) if packed else (6, 283)
    tensors, mask = [torch.randn(shape) for _ in range(count)], None
    if masked:
        mask = torch.rand(shape) < 0.6
        if packed:
            mask[5:290] = False
        else:
            mask[1], mask[2, 40:], mask[3, :100], mask[4, -1] = False, False, False, True
        tensors = [t.masked_fill(~mask, garbage) for t, garbage in zip(tensors, (NAN, INF, -INF), strict=False)]
    return tensors, mask, boundaries(LENGTHS) if packed else None


layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])

# ---- sums and means ---------------------------------------------------------------------------------------------------


def sequence_sums(
    simt, values, mask=None, *, mean=False, minus=None, weights=None, transform="none", cu_seqlens=None, starts=None, ends=None,
    head=None, tail_weight=1.0, decay=1.0,
):  # fmt: skip
    """Sums, and the gradient of sums times 1, 2, 3, ..."""
    args = simt.SequenceSumArgs()
    sums = torch.full((set_layout(args.layout, values, cu_seqlens),), NAN)
    upstream, grad = torch.arange(1.0, len(sums) + 1), tensor_like(values)
    args.transform, args.mean = getattr(simt.TokenTransform, transform), mean
    args.values, args.minus, args.weights, args.mask = map(pointer, (values, minus, weights, mask))
    args.sums, args.upstream, args.grad = map(pointer, (sums, upstream, grad))
    args.starts, args.ends, args.head = map(pointer, (starts, ends, head))
    args.place.tail, args.place.decay = tail_weight, decay
    simt.cuda_sequence_sums(args)
    simt.cuda_sequence_sums_backward(args)
    return {"sums": sums, "grad": grad}


@layouts
@masks
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("transform", ["none", "exp"])
@pytest.mark.parametrize("extras", ["", "minus", "weights", "both"])
def test_sequence_sums(simt, packed, masked, mean, transform, extras):
    (values, minus, weights), mask, cu_seqlens = sample(packed, masked, 3)
    options = {"transform": transform, "cu_seqlens": cu_seqlens}
    if extras in ("minus", "both"):
        options["minus"] = minus
    if extras in ("weights", "both"):
        options["weights"] = weights
    out = same_bits_in_every_order(simt, lambda: sequence_sums(simt, values, mask, mean=mean, **options))
    options = {name: t.double() if name in ("minus", "weights") else t for name, t in options.items()}
    leaf = values.double().requires_grad_()
    definition = reference.sequence_mean if mean else reference.sequence_sum
    expected = definition(leaf, mask, **options)
    close(out["sums"], expected.detach(), atol=1e-5)
    close(out["grad"], torch.autograd.grad(expected, leaf, torch.arange(1.0, len(expected) + 1).double())[0], rtol=1e-6)
    assert not masked or not out["grad"][~mask].any()


@layouts
@masks
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("transform", ["none", "exp"])
@pytest.mark.parametrize("places", ["span", "head", "decay", "all"])
def test_spans_and_places(simt, packed, masked, mean, transform, places):
    """Packed, the longest row reaches into a second tile of 1024 tokens."""
    lengths = (0, 1, 300, 1025, 64, 43) if packed else (283,) * 6
    shape = (sum(lengths),) if packed else (6, 283)
    values, minus, weights = (torch.randn(shape) for _ in range(3))
    mask = torch.rand(shape) < 0.6 if masked else None
    if masked:
        values, weights = values.masked_fill(~mask, NAN), weights.masked_fill(~mask, INF)
    options = {"transform": transform, "cu_seqlens": boundaries(lengths) if packed else None}
    if places in ("span", "all"):
        options["starts"] = torch.tensor([n // 5 for n in lengths])
        options["ends"] = torch.tensor([n - n // 50 for n in lengths])
    if places in ("head", "all"):
        options |= {"head": torch.tensor([0, 1, 50, 400, 2000, 3]), "tail_weight": -0.25}
    if places in ("decay", "all"):
        options["decay"] = 0.99
    call = {"mean": mean, "minus": minus, "weights": weights, **options}
    out = same_bits_in_every_order(simt, lambda: sequence_sums(simt, values, mask, **call))
    leaf = values.double().requires_grad_()
    definition = reference.sequence_mean if mean else reference.sequence_sum
    expected = definition(leaf, mask, minus=minus.double(), weights=weights.double(), **options)
    close(out["sums"], expected.detach(), atol=3e-5)
    close(out["grad"], torch.autograd.grad(expected, leaf, torch.arange(1.0, len(expected) + 1).double())[0], rtol=3e-6)


def test_a_wrong_span_makes_its_sequence_nan(simt):
    values, starts, ends = torch.randn(6, 30), torch.tensor([0, 31, -1, 5, 0, 30]), torch.tensor([30, 31, 3, 4, 2**40, 30])
    head = torch.zeros(6, dtype=torch.int64)
    out = sequence_sums(simt, values, starts=starts, ends=ends, head=head)
    wrong = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(out["sums"].isnan(), wrong)
    assert torch.equal(out["grad"].isnan(), wrong[:, None].expand(6, 30))
    assert all(t.isnan().all() for t in sequence_sums(simt, values, head=head - 1).values())


@pytest.mark.parametrize("lengths", WRONG)
def test_sequence_sums_of_a_wrong_layout_are_nan(simt, lengths):
    for mean in (False, True):
        out = sequence_sums(simt, torch.randn(40), mean=mean, cu_seqlens=torch.tensor(lengths, dtype=torch.int32))
        assert all(t.isnan().all() for t in out.values())


def test_sequence_sums_of_nothing(simt):
    simt.cuda_sequence_sums(simt.SequenceSumArgs())
    simt.cuda_sequence_sums_backward(simt.SequenceSumArgs())
    assert sequence_sums(simt, torch.empty(3, 0), mean=True)["sums"].tolist() == [0, 0, 0]


# ---- returns and advantage estimates ----------------------------------------------------------------------------------


def returns(
    simt, rewards, values=None, mask=None, *, gamma=1.0, lam=1.0, bootstrap="zero", cu_seqlens=None, lengths=None,
    finished=None, last_values=None,
):  # fmt: skip
    args = simt.ReturnsArgs()
    set_layout(args.layout, rewards, cu_seqlens)
    args.rule.gamma, args.rule.decay = gamma, gamma * lam
    args.rule.bootstrap = getattr(simt.Bootstrap, bootstrap)
    out = {"advantages": tensor_like(rewards)}
    if values is not None:
        out["returns"] = tensor_like(rewards)
        args.returns = pointer(out["returns"])
    args.rewards, args.values, args.mask, args.lengths = map(pointer, (rewards, values, mask, lengths))
    args.finished, args.last_values, args.advantages = map(pointer, (finished, last_values, out["advantages"]))
    simt.cuda_returns(args)
    return out


@layouts
@masks
@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
def test_discounted_returns(simt, packed, masked, gamma):
    (rewards,), mask, cu_seqlens = sample(packed, masked, 1)
    out = same_bits_in_every_order(simt, lambda: returns(simt, rewards, None, mask, gamma=gamma, cu_seqlens=cu_seqlens))
    expected = reference.discounted_returns(rewards.double(), mask, gamma=gamma, cu_seqlens=cu_seqlens)
    close(out["advantages"], expected, atol=1e-6, rtol=1e-7)


@layouts
@masks
@pytest.mark.parametrize("bootstrap", ["repeat", "critic", "zero"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae(simt, packed, masked, bootstrap, gamma, lam):
    (rewards, values), mask, cu_seqlens = sample(packed, masked, 2)
    sequences = len(LENGTHS) if packed else 6
    finished = torch.arange(sequences) % 3 == 1
    options = {"gamma": gamma, "lam": lam, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens, "finished": finished}
    if bootstrap == "critic":
        options["last_values"] = torch.randn(sequences).masked_fill(finished, NAN)
    out = same_bits_in_every_order(simt, lambda: returns(simt, rewards, values, mask, **options))
    expected = reference.gae(rewards.double(), values.double(), mask, **options)
    close(out["advantages"], expected.advantages, atol=1e-6, rtol=1e-7)
    close(out["returns"], expected.returns, atol=1e-6, rtol=1e-7)


def test_gae_up_to_a_length(simt):
    lengths = torch.tensor([283, 0, 1, 127, 128, 129])
    (rewards, values), _, _ = sample(False, False, 2)
    outside = torch.arange(283) >= lengths[:, None]
    rewards, values = rewards.masked_fill(outside, NAN), values.masked_fill(outside, INF)
    options = {"lengths": lengths, "finished": torch.arange(6) % 2 == 0, "lam": 0.9, "bootstrap": "repeat"}
    out = same_bits_in_every_order(simt, lambda: returns(simt, rewards, values, **options))
    expected = reference.gae(rewards.double(), values.double(), **options)
    close(out["advantages"], expected.advantages, atol=1e-6)
    close(out["returns"], expected.returns, atol=1e-6)


def test_gae_of_a_wrong_length_is_nan(simt):
    (rewards, values), _, _ = sample(False, False, 2)
    lengths = torch.tensor([283, 284, -1, 2**40, 5, 0])
    out = returns(simt, rewards, values, lengths=lengths)
    wrong = (lengths < 0) | (lengths > 283)
    for t in out.values():
        assert torch.equal(t.isnan().all(1), wrong) and torch.equal(t.isnan().any(1), wrong)


@pytest.mark.parametrize("lengths", WRONG)
def test_returns_of_a_wrong_layout_are_nan(simt, lengths):
    cu_seqlens = torch.tensor(lengths, dtype=torch.int32)
    for values in (None, torch.randn(40)):
        out = returns(simt, torch.randn(40), values, cu_seqlens=cu_seqlens)
        assert all(t.isnan().all() for t in out.values())


def test_nan_in_a_reward_reaches_what_lies_before(simt):
    rewards = torch.zeros(2, 300)
    rewards[1, 140] = NAN
    nan = returns(simt, rewards, torch.zeros(2, 300))["advantages"].isnan()
    assert not nan[0].any()
    assert torch.equal(nan[1], torch.arange(300) <= 140)


# ---- returns of segments ----------------------------------------------------------------------------------------------


def segmented_returns(simt, rewards, segment, order, *, gamma):
    args = simt.SegmentedArgs()
    by_place = torch.argsort(order, stable=True)
    rows = by_place[torch.argsort(segment[by_place], stable=True)]
    segment, place, out = segment[rows], order[rows], tensor_like(rewards)
    args.gamma, args.count = gamma, len(rewards)
    args.rewards, args.segment, args.place, args.rows = map(pointer, (rewards, segment, place, rows))
    args.returns = pointer(out)
    simt.cuda_segmented_returns(args)
    return out


@pytest.mark.parametrize("size", [1, 7, 300, 1000])
@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
def test_segmented_returns(simt, size, gamma):
    rewards, order = torch.randn(size), torch.randperm(size) * 5 - 9
    segment = torch.randint(-2, 1 + size // 200, (size,)) * 2**33
    out = same_bits_in_every_order(simt, lambda: segmented_returns(simt, rewards, segment, order, gamma=gamma))
    expected = reference.segmented_returns(rewards.double(), segment, order, gamma=gamma)
    close(out, expected, atol=1e-6, rtol=1e-7)


def test_a_place_that_occurs_twice_makes_its_segment_nan(simt):
    segment, order = torch.arange(120) // 40, torch.arange(120)
    clean = segmented_returns(simt, torch.ones(120), segment, order, gamma=0.9)
    order[79] = order[78]
    out = segmented_returns(simt, torch.ones(120), segment, order, gamma=0.9)
    assert torch.equal(out.isnan(), segment == 1)
    assert same_bits(out[segment != 1], clean[segment != 1])


def test_no_rows_launch_nothing(simt):
    simt.cuda_returns(simt.ReturnsArgs())
    simt.cuda_segmented_returns(simt.SegmentedArgs())
