"""The CUDA kernels of csrc/meta, compiled for the CPU by tests/simt, against float64 PyTorch and the CPU's."""

from __future__ import annotations

import pytest
import torch

from prefkern import _C, reference
from simt.harness import NAN, close, launches, pointer, same_bits_in_every_order, tensor_like

sizes = pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 8), (300, 2, 5), (513, 7, 32)])


def rows(count, actions, width):
    probs, y, y_hat = (torch.randn(count, n).softmax(-1) for n in (actions, width, width))
    return probs, torch.randint(actions, (count,)), y, torch.randn(count), y_hat


def inner_loss(module, prefix, given, above=(None,) * 4, upstream=0.7, wanted=15):
    """Everything that the three launchers make."""
    probs, _, y, pi_hat, y_hat = given
    blocks = -(-len(probs) // 256)
    args = module.LpgArgs()
    args.rule.alpha, args.rule.sign = 0.6, -1.0
    args.rows, args.actions, args.width = *probs.shape, y.shape[1]
    args.probs, args.taken, args.y, args.adjustment, args.target = map(pointer, given)
    sums, finished = torch.full((blocks, 2), NAN, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    out, terms, up = torch.full((1,), NAN), torch.full((2,), NAN), torch.tensor([upstream])
    args.sums, args.finished, args.out, args.terms, args.upstream = map(pointer, (sums, finished, out, terms, up))
    getattr(module, f"{prefix}_lpg_loss")(args)
    results = {"loss": out.clone(), "terms": terms}

    def gradients(name):
        made = [tensor_like(t) if wanted >> k & 1 else None for k, t in enumerate((probs, y, pi_hat, y_hat))]
        args.probs_grad, args.y_grad, args.adjustment_grad, args.target_grad = map(pointer, made)
        return made, {f"{name} {k}": t for k, t in enumerate(made) if t is not None}

    kept, first = gradients("first")
    getattr(module, f"{prefix}_lpg_gradients")(args)
    also_kept, second = gradients("second")
    finished.zero_()
    out.fill_(NAN)
    args.above_probs, args.above_y, args.above_adjustment, args.above_target = map(pointer, above)
    getattr(module, f"{prefix}_lpg_second")(args)
    assert len(kept) == len(also_kept)
    return {**results, **first, **second, "by upstream": out}


def expected_of(given, above, upstream):
    """The same by autograd, in float64."""
    probs, actions, *others = given
    wide = [t.double().requires_grad_() for t in (probs, *others)]
    g = torch.tensor([upstream], dtype=torch.float64, requires_grad=True)
    loss, metrics = reference.lpg_inner_loss(wide[0], actions, *wide[1:], alpha_y=0.6, sign="paper")
    leaves = [wide[0], wide[1], wide[2], wide[3]]
    first = torch.autograd.grad(loss, leaves, g[0], create_graph=True)
    total = sum((t * u.double()).sum() for t, u in zip(first, above, strict=True) if u is not None)
    second = torch.autograd.grad(total, [g, *leaves], materialize_grads=True)
    results = {
        "loss": loss.detach().view(1),
        "terms": torch.stack([metrics["policy"], metrics["kl"]]),
        "by upstream": second[0],
    }
    results |= {f"first {k}": t.detach() for k, t in enumerate(first)}
    return {**results, **{f"second {k}": t for k, t in enumerate(second[1:])}}


@sizes
@pytest.mark.parametrize("missing", [(), (1, 3), (0, 2)], ids=["all", "policy alone", "prediction alone"])
def test_inner_loss(simt, size, missing):
    given = rows(*size)
    above = [None if k in missing else torch.randn(t.shape) for k, t in enumerate((given[0], *given[2:]))]
    out = same_bits_in_every_order(simt, lambda: inner_loss(simt, "cuda", given, above))
    expected = expected_of(given, above, 0.7)
    on_cpu = inner_loss(_C, "cpu", given, above)
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        close(out[name] / scale, value / scale, atol=2e-6)
        close(on_cpu[name] / scale, value / scale, atol=2e-6)


def test_one_launch_each_and_only_what_is_wanted(simt):
    given = rows(70, 3, 4)
    assert launches(simt, lambda: inner_loss(simt, "cuda", given)) == 3
    everything, some = inner_loss(simt, "cuda", given), inner_loss(simt, "cuda", given, wanted=6)
    assert set(some) == set(everything) - {"first 0", "first 3", "second 0", "second 3"}
    assert all(torch.equal(some[name], everything[name]) for name in some)


def test_an_unknown_action_makes_its_row_nan(simt):
    probs, actions, *others = rows(300, 3, 4)
    for bad in (3, -1, 2**40):
        actions[290] = bad
        out = inner_loss(simt, "cuda", (probs, actions, *others))
        assert out["loss"].isnan().all() and not out["terms"][1].isnan()
        for name in ("first 0", "first 2"):
            wrong = out[name].reshape(300, -1).isnan()
            assert wrong[290].all() and wrong.sum() == wrong[290].numel()
        assert not out["first 1"].isnan().any()


def scan(module, given, upstream, product):
    """All steps forward and backward, with the products that the op makes in between."""
    gates, done, weight, bias = given
    count, steps, hidden = *gates.shape[:2], bias.shape[0]
    args = module.GruArgs()
    args.rows, args.steps, args.hidden = count, steps, hidden
    out, saved = torch.full((count, steps, hidden), NAN), torch.full((count, steps, 4 * hidden), NAN)
    args.gates, args.done, args.bias, args.out, args.saved = map(pointer, (gates, done, bias, out, saved))
    carry, from_state = torch.zeros(count, hidden), torch.zeros(count, 3 * hidden)
    args.carry, args.product = pointer(carry), pointer(from_state)
    for step in range(steps - 1, -1, -1):
        if step + 1 < steps:
            from_state.copy_(product(carry, weight.T))
        args.step = step
        module.cuda_gru_forward_step(args)
    grads = torch.full_like(gates, NAN), torch.full_like(out, NAN), torch.full_like(out, NAN)
    args.grad_out = pointer(upstream)
    args.grad_gates, args.grad_inner, args.before = map(pointer, grads)
    carry, back = torch.zeros(count, hidden), torch.zeros(count, hidden)
    args.carry, args.product = pointer(carry), pointer(back)
    for step in range(steps):
        args.step = step
        module.cuda_gru_backward_step(args)
        by_gates = torch.cat([grads[0][:, step, : 2 * hidden], grads[1][:, step]], -1)
        back.copy_(product(by_gates, weight))
    columns, sums = module.ColumnSumArgs(), torch.full((hidden,), NAN)
    columns.rows, columns.columns = count * steps, hidden
    columns.values, columns.sums = pointer(grads[1]), pointer(sums)
    module.cuda_column_sums(columns)
    return {"states": out, "gates": grads[0], "inner": grads[1], "before": grads[2], "bias": sums}


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (40, 4, 33)])
@pytest.mark.parametrize("masked", [False, True], ids=["no terminals", "terminals"])
def test_reverse_gru(simt, size, masked):
    count, steps, hidden = size
    gates, weight, bias = torch.randn(count, steps, 3 * hidden), 0.3 * torch.randn(3 * hidden, hidden), torch.randn(hidden)
    done, upstream = (torch.rand(count, steps) < 0.4) if masked else None, torch.randn(count, steps, hidden)
    # In float64, rounded once: the same bits whoever multiplies.
    found = same_bits_in_every_order(
        simt, lambda: scan(simt, (gates, done, weight, bias), upstream, lambda a, b: (a.double() @ b.double()).float())
    )
    wide = [t.double().requires_grad_() for t in (gates, weight, bias)]
    identity = torch.eye(3 * hidden, dtype=torch.float64)
    states = reference.reverse_gru_reset(wide[0], done, identity, wide[1], None, wide[2])
    grads = torch.autograd.grad(states, wide, upstream.double())
    close(found["states"], states.detach(), atol=2e-6)
    close(found["gates"], grads[0], atol=5e-6)
    close(found["bias"], grads[2], atol=2e-5)
    by_gates = torch.cat([found["gates"][..., : 2 * hidden], found["inner"]], -1).double().flatten(0, 1)
    close(by_gates.T @ found["before"].double().flatten(0, 1), grads[1], atol=2e-5)
