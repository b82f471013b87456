"""Weights that training keeps in parts: DTensors, in place and gathered, and ZeRO-3 parameters, gathered twice."""

import contextlib
import functools
import gc
import sys
import types

import pytest
import torch
import torch.distributed as dist
from test_vocab_parallel import Messages
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from prefkern import linear_logprobs
from prefkern.distributed import gathered, vocab_shard
from ranks import run_ranks

ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
ROWS, WIDTH = 11, 8


def make(vocab, dtype=F64):
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(*s).to(dtype) for s in ((ROWS, WIDTH), (vocab, WIDTH), (vocab,)))
    targets = torch.randint(0, vocab, (ROWS,))
    targets[3] = -100
    return hidden, weight, bias, targets


def leaf(t):
    return t.detach().clone().requires_grad_()


def parameter(t, mesh, placement):
    return nn.Parameter(distribute_tensor(t.clone(), mesh, [placement]))


def loss_of(out):
    return out.logp.sum() + 0.3 * out.entropy.sum() + 0.1 * out.lse.sum()


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


PLACEMENTS, GRADIENTS = (Shard(0), Shard(1), Replicate()), (None, "mean", "sum", "same")
IN_PLACE = [(2, 6, [3, 3]), (2, 7, [4, 3]), (4, 301, [76, 76, 76, 73]), (4, 5, [2, 2, 1, 0])]


def all_on_rank(rank, size):
    """Everything below that needs `size` processes: it takes them longer to load DTensors than to do it."""
    calls = {("in place", vocab): (in_place_on_rank, size, vocab) for n, vocab, _ in IN_PLACE if n == size}
    if size == 2:
        calls |= {("other", placement): (other_placements_on_rank, placement) for placement in PLACEMENTS[1:]}
        calls |= {("data parallel", p, g): (data_parallel_on_rank, p, g) for p in PLACEMENTS for g in GRADIENTS}
        calls |= {("fsdp", autocast): (fsdp_on_rank, autocast) for autocast in (False, True)}
    else:
        calls["refusals",] = (refusals_on_rank,)
    return {name: function(rank, *args) for name, (function, *args) in calls.items()}


@functools.cache
def outcomes(size):
    by_rank = run_ranks(all_on_rank, size, size)
    return {name: [found[name] for found in by_rank] for name in by_rank[0]}


# ----------------------------------------------------------------------------------------------------- DTensors in place


def in_place_on_rank(rank, size, vocab):
    hidden, weight, bias, targets = make(vocab)
    mesh = init_device_mesh("cpu", (size,))
    w, b, h = parameter(weight, mesh, Shard(0)), parameter(bias, mesh, Shard(0)), leaf(hidden)
    with Messages() as sent:
        out = linear_logprobs(h, w, targets, bias=b, group=mesh.get_group(), outputs=ALL)
        loss_of(out).backward()
    for grad in (w.grad, b.grad):
        assert isinstance(grad, DTensor)
        assert grad.placements == (Shard(0),)
    found = {"out": [t.detach() for t in out], "grads": (h.grad, w.grad.full_tensor(), b.grad.full_tensor()), "sent": sent}
    found["local"] = w.to_local().shape[0]
    with Messages() as sent:
        found["shard"] = tuple(vocab_shard(w, mesh.get_group(), vocab=vocab))
    assert sent == []
    everywhere = parameter(bias, mesh, Replicate())
    out = linear_logprobs(hidden, w.detach(), targets, bias=everywhere, group=mesh.get_group(), outputs=ALL)
    loss_of(out).backward()
    assert everywhere.grad.placements == (Replicate(),)
    found["bias"] = everywhere.grad.to_local()
    return found


@pytest.mark.parametrize(("size", "vocab", "rows"), IN_PLACE)
def test_a_weight_in_shard_0_is_used_in_place(size, vocab, rows):
    hidden, weight, bias, targets = make(vocab)
    h, w, b = leaf(hidden), leaf(weight), leaf(bias)
    expected = linear_logprobs(h, w, targets, bias=b, outputs=ALL)
    loss_of(expected).backward()
    results = outcomes(size)["in place", vocab]
    assert [found["local"] for found in results] == rows
    assert [found["shard"] for found in results] == [(sum(rows[:i]), vocab) for i in range(size)]
    for found in results:
        for a, e in zip(found["out"], expected, strict=True):
            near(a, e.detach())
        for a, e in zip(found["grads"], (h, w, b), strict=True):
            near(a, e.grad)
        near(found["bias"], b.grad)
        # Where the ranges lie is known from the layout.
        assert found["sent"] == [("gather", F64, 7 * ROWS + 7), ("reduce", F64, ROWS * WIDTH)]


def other_placements_on_rank(rank, placement):
    """With a group all ranks have the same rows."""
    hidden, weight, bias, targets = make(6)
    mesh = init_device_mesh("cpu", (2,))
    w, b, h = parameter(weight, mesh, placement), parameter(bias, mesh, Replicate()), leaf(hidden)
    out = linear_logprobs(h, w, targets, bias=b, group=mesh.get_group(), outputs=ALL)
    loss_of(out).backward()
    assert w.grad.placements == (placement,)
    assert b.grad.placements == (Replicate(),)
    return [t.detach() for t in out], (h.grad, w.grad.full_tensor(), b.grad.full_tensor())


@pytest.mark.parametrize("placement", PLACEMENTS[1:])
def test_other_placements_are_gathered(placement):
    hidden, weight, bias, targets = make(6)
    leaves = leaf(hidden), leaf(weight), leaf(bias)
    expected = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], outputs=ALL)
    loss_of(expected).backward()
    for out, grads in outcomes(2)["other", placement]:
        for a, e in zip(out, expected, strict=True):
            near(a, e.detach())
        for a, e in zip(grads, leaves, strict=True):
            near(a, e.grad)


# ------------------------------------------------------------------------------------------------ DTensors that are gathered


def rows_of(rank, hidden, targets):
    """Different ones on every rank, and of different numbers."""
    mine = slice(0, 4) if rank == 0 else slice(4, None)
    return hidden[mine], targets[mine]


def data_parallel_on_rank(rank, placement, gradient):
    hidden, weight, bias, targets = make(7)
    mesh = init_device_mesh("cpu", (2,))
    w, b = parameter(weight, mesh, placement), parameter(bias, mesh, Replicate())
    h, t = rows_of(rank, hidden, targets)
    h = leaf(h)
    if gradient is None:
        loss_of(linear_logprobs(h, w, t, bias=b, outputs=ALL)).backward()
    else:
        with gathered(w, gradient=gradient) as whole, gathered(b, gradient=gradient) as whole_bias:
            assert type(whole) is torch.Tensor
            out = linear_logprobs(h, whole, t, bias=whole_bias, outputs=ALL)
        loss_of(out).backward()
    assert w.grad.placements == (placement,)
    assert b.grad.placements == (Replicate(),)
    return h.grad, w.grad.to_local() if placement == Shard(0) else w.grad.full_tensor(), b.grad.to_local()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_without_a_group_each_rank_has_rows_of_its_own(placement, gradient):
    """The gradient of the hidden states is the rank's own, that of the weight what `gradient` says; None: the mean."""
    hidden, weight, bias, targets = make(7)
    each = []
    for rank in range(2):
        h, t = rows_of(rank, hidden, targets)
        leaves = leaf(h), leaf(weight), leaf(bias)
        loss_of(linear_logprobs(leaves[0], leaves[1], t, bias=leaves[2], outputs=ALL)).backward()
        each.append([x.grad for x in leaves])
    (_, w0, b0), (_, w1, b1) = each
    d_weight, d_bias = (w0 + w1, b0 + b1) if gradient == "sum" else ((w0 + w1) / 2, (b0 + b1) / 2)
    results = outcomes(2)["data parallel", placement, gradient]
    for rank, (d_hidden, w, b) in enumerate(results):
        near(d_hidden, each[rank][0])
        mine = slice(0, 4) if rank == 0 else slice(4, None)
        part = mine if placement == Shard(0) else slice(None)
        if gradient != "same":
            near(w, d_weight[part])
            near(b, d_bias)
        elif placement == Shard(0):  # nobody asks the others
            near(w, (w0, w1)[rank][part])
            near(b, (b0, b1)[rank])


def fsdp_on_rank(rank, autocast):
    """The same head, under FSDP2's own hooks and with its weight taken from outside of them."""
    from torch.distributed.fsdp import fully_shard

    hidden, weight, bias, targets = make(7, F32)
    h, t = rows_of(rank, hidden, targets.clamp_min(0))
    grads = []
    for ours in (False, True):
        head = nn.Linear(WIDTH, 7)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
        assert head.weight.placements == (Shard(0),)
        if ours:
            with torch.autocast("cpu", BF16, enabled=autocast):
                logp = linear_logprobs(h, head.weight, t, bias=head.bias).logp
        else:
            logp = head(h).log_softmax(-1).gather(-1, t[:, None])
        logp.sum().backward()
        assert head.weight.grad.placements == (Shard(0),)
        grads.append((head.weight.grad.full_tensor(), head.bias.grad.full_tensor()))
    return grads


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_is_what_fsdp_makes_it(autocast):
    for plain, ours in outcomes(2)["fsdp", autocast]:
        for a, e in zip(ours, plain, strict=True):
            assert a.dtype == F32
            torch.testing.assert_close(a, e, rtol=0, atol=0.05 if autocast else 1e-6)
            assert e.abs().max() > 0.2


def refusals_on_rank(rank):
    hidden, weight, _, targets = make(8)
    mesh = init_device_mesh("cpu", (4,))
    flat, w = mesh.get_group(), parameter(weight, mesh, Shard(0))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = distribute_tensor(weight, square, [Replicate(), Shard(0)])
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    spread, copied = parameter(weight, mesh, Replicate()), distribute_tensor(targets, mesh, [Replicate()])
    for error, message, changes in (
        (ValueError, "mesh of 2 dimensions", {"weight": both, "group": square.get_group("tp")}),
        (ValueError, r"DTensor on ranks \[0, 1, 2, 3\], and group has", {"group": halves[rank // 2]}),
        (ValueError, "vocab is 9, but weight is a DTensor", {"vocab": 9}),
        (ValueError, "vocab_offset is 7 and vocab is 8, but", {"vocab_offset": 7, "vocab": 8}),
        (ValueError, "not placed as", {"weight": spread, "vocab_offset": 0, "vocab": 8}),
        (ValueError, "group is None", {"group": None, "vocab": 8}),
        (TypeError, "hidden is a DTensor", {"hidden": distribute_tensor(hidden, mesh, [Replicate()])}),
        (TypeError, "targets is a DTensor", {"targets": copied}),
    ):
        with pytest.raises(error, match=message):
            linear_logprobs(**{"hidden": hidden, "weight": w, "targets": targets, "group": flat, **changes})
    with pytest.raises(ValueError, match=r"placed as \[Replicate\(\)\]; a range is one in"):
        vocab_shard(spread, flat)
    with pytest.raises(ValueError, match="DTensor of 8 rows; vocab is 9"):
        vocab_shard(w, flat, vocab=9)
    local = both.to_local()  # what the first message says
    out = linear_logprobs(hidden, local, targets, group=square.get_group("tp"))
    given = linear_logprobs(hidden, w, targets, group=flat, vocab_offset=2 * rank, vocab=8)
    return out.logp, given.logp


def test_dtensors_that_cannot_be_used():
    hidden, weight, _, targets = make(8)
    expected = linear_logprobs(hidden, weight, targets).logp
    for results in outcomes(4)["refusals",]:
        for logp in results:
            near(logp, expected)


# ----------------------------------------------------------------------------------------------------------------- ZeRO-3


class Zero:
    """A stand-in for what DeepSpeed does to a parameter: kept in parts with no data of its own, whole in a context. Says what
    happened when."""

    def __init__(self, *parameters):
        self.log, self.open = [], 0
        for i, p in enumerate(parameters):
            p.ds_id, p.ds_whole, p.ds_shape = i, p.data, p.shape
            # DeepSpeed, too, makes the accumulators while parameters are whole, and keeps them.
            p.ds_accumulator = p.view_as(p).grad_fn.next_functions[0][0] if p.requires_grad else None
            self.partition(p)

    def partition(self, p):
        p.data = torch.empty(0, dtype=p.dtype)

    def GatheredParameters(self, params, modifier_rank=None, fwd_module=None, enabled=True):
        assert modifier_rank is None
        return self.gather(*params)

    @contextlib.contextmanager
    def gather(self, p):
        self.log.append("gather")
        p.data = p.ds_whole.clone()
        version = p._version
        yield
        assert p._version == version, "changed in place"
        self.partition(p)
        self.log.append("partition")


@pytest.fixture
def deepspeed(monkeypatch):
    """`import deepspeed` gives the stand-in."""

    def install(zero):
        monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
        return zero

    return install


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("seam", ["deepspeed", "gather"])
def test_a_zero_parameter_is_gathered_for_the_forward_and_again_for_the_backward(deepspeed, dtype, inside, seam):
    hidden, weight, _, targets = make(9, dtype)
    h0, w0 = leaf(hidden), leaf(weight)
    expected = linear_logprobs(h0, w0, targets, outputs=ALL)
    loss_of(expected).backward()

    h, p = leaf(hidden), nn.Parameter(weight.clone())
    zero = deepspeed(Zero(p)) if seam == "deepspeed" else Zero(p)
    stack = contextlib.ExitStack()
    with stack:
        w = stack.enter_context(gathered(p, gather=None if seam == "deepspeed" else zero.gather))
        assert w.shape == p.ds_shape
        out = linear_logprobs(h, w, targets, outputs=ALL)
        if not inside:
            stack.close()
            assert p.numel() == 0
        zero.log.append("backward")
        loss_of(out).backward()
    assert p.numel() == 0
    expected_log = ["gather", "backward", "gather", "partition", "partition"] if inside else [
        "gather", "partition", "backward", "gather", "partition"
    ]  # fmt: skip
    assert zero.log == expected_log
    for a, e in zip(out, expected, strict=True):
        assert torch.equal(a, e)
    assert torch.equal(h.grad, h0.grad)
    assert torch.equal(p.grad, w0.grad)


def test_between_forward_and_backward_the_graph_does_not_hold_the_weight():
    hidden, weight, _, targets = make(1000)
    h, p = leaf(hidden), nn.Parameter(weight.clone())
    zero = Zero(p)
    with gathered(p, gather=zero.gather) as w:
        storage = w.untyped_storage()._weak_ref()
        out = linear_logprobs(h, w, targets)
    del w
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    out.logp.sum().backward()
    assert p.grad.shape == weight.shape


def test_a_frozen_zero_parameter_and_other_ways_through_the_backward():
    hidden, weight, _, targets = make(9)
    h0, w0 = leaf(hidden), leaf(weight)
    linear_logprobs(h0, w0, targets).logp.sum().backward()
    # Frozen: gathered until the backward ends.
    h, p = leaf(hidden), nn.Parameter(weight.clone(), requires_grad=False)
    zero = Zero(p)
    with gathered(p, gather=zero.gather) as w:
        out = linear_logprobs(h, w, targets, save="recompute")
    out.logp.sum().backward()
    assert torch.equal(h.grad, h0.grad)
    assert p.grad is None
    assert zero.log == ["gather", "partition"] * 2
    # Row gradients that were saved need no weight.
    h, q = leaf(hidden), nn.Parameter(weight.clone(), requires_grad=False)
    unasked = Zero(q)
    with gathered(q, gather=unasked.gather) as w:
        out = linear_logprobs(h, w, targets)
    out.logp.sum().backward()
    torch.testing.assert_close(h.grad, h0.grad)
    assert unasked.log == ["gather", "partition"]
    # Gradients that are not accumulated, twice through one graph.
    h, p = leaf(hidden), nn.Parameter(weight.clone())
    zero = Zero(p)
    with gathered(p, gather=zero.gather) as w:
        out = linear_logprobs(h, w, targets)
    for _ in range(2):
        (d_hidden,) = torch.autograd.grad(out.logp.sum(), h, retain_graph=True)
        assert torch.equal(d_hidden, h0.grad)
        assert p.numel() == 0
    assert zero.log == ["gather", "partition"] * 3
    # Accumulated over two forwards.
    for i in range(2):
        with gathered(p, gather=zero.gather) as w:
            out = linear_logprobs(h, w, targets)
        out.logp.sum().backward()
        assert torch.equal(p.grad, (i + 1) * w0.grad)
    assert zero.log == ["gather", "partition"] * 7
    assert not p._post_accumulate_grad_hooks
    # No graph, no second gathering.
    with torch.no_grad(), gathered(p, gather=zero.gather) as w:
        logp = linear_logprobs(h, w, targets).logp
    assert logp.grad_fn is None
    assert zero.log == ["gather", "partition"] * 8


def test_autocast_of_a_zero_parameter():
    """The narrow copy is what the head saves."""
    hidden, weight, _, targets = make(9, F32)
    h0, w0 = leaf(hidden), leaf(weight)
    h, p = leaf(hidden), nn.Parameter(weight.clone())
    zero = Zero(p)
    with torch.autocast("cpu", BF16):
        linear_logprobs(h0, w0, targets).logp.sum().backward()
        with gathered(p, gather=zero.gather) as w:
            out = linear_logprobs(h, w, targets)
    out.logp.sum().backward()
    assert torch.equal(p.grad, w0.grad)
    assert torch.equal(h.grad, h0.grad)


def test_any_other_weight_is_itself():
    p = nn.Parameter(torch.ones(2, 2))
    with gathered(p) as w:
        assert w is p


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, "weight is a list"),
        ({"weight": torch.ones(2), "gradient": "avg"}, ValueError, "gradient is 'avg'; accepted: 'mean', 'sum', 'same'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message), gathered(**arguments):
        pass
