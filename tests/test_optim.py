"""Nesterov extrapolation of weights, and extragradient steps around any optimiser."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import prefkern
from prefkern import optim
from prefkern.optim import ExtragradientStep, nesterov_extrapolate

F64 = torch.float64


def small_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


# ---- Nesterov


def test_worked_extrapolation() -> None:
    new, old = torch.tensor([1.0, 2], dtype=F64), torch.tensor([0.5, 3], dtype=F64)
    (found,) = nesterov_extrapolate([new], [old], 0.1)
    assert_close(found, torch.tensor([1.05, 1.9], dtype=F64), rtol=0, atol=1e-15)
    assert nesterov_extrapolate({"w": new}, {"w": old}, 0.1)["w"].equal(found)


@given(st.floats(0, 0.999), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_against_the_formula(alpha, dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    new, old = ([torch.randn(n, 3, generator=generator).to(dtype) for n in (1, 4, 70)] for _ in range(2))
    wide = F64 if dtype == F64 else torch.float32
    for found, n, o in zip(nesterov_extrapolate(new, old, alpha), new, old, strict=True):
        exact = (n.to(wide) + alpha * (n.to(wide) - o.to(wide))).to(dtype)  # rounded once
        assert found.dtype == dtype and found.equal(exact)
    assert all(same.equal(n) for same, n in zip(nesterov_extrapolate(new, new, alpha), new, strict=True))


def test_no_momentum_is_a_copy() -> None:
    new, old = torch.randn(5), torch.randn(5)
    (found,) = nesterov_extrapolate([new], [old], 0)
    assert found.equal(new) and found.data_ptr() != new.data_ptr()


def test_a_linear_policy_is_extrapolated_exactly() -> None:
    features = torch.randn(7, 4, dtype=F64)
    new, old = torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)
    (weights,) = nesterov_extrapolate([new], [old], 0.4)
    logp_new, logp_old = (torch.log_softmax(features @ w, 0) for w in (new, old))
    policy = torch.log_softmax(logp_new + 0.4 * (logp_new - logp_old), 0)
    assert_close(torch.log_softmax(features @ weights, 0), policy, rtol=0, atol=1e-13)


def test_of_modules_only_what_is_trained_moves() -> None:
    new, old = small_model(0), small_model(1)
    new[2].bias.requires_grad_(False)
    new[1](torch.randn(8, 6))  # moves running statistics and the counter
    found = nesterov_extrapolate(new, old, 0.5)
    state, before = new.state_dict(), old.state_dict()
    assert list(found) == list(state)
    for name, value in found.items():
        moved = (
            state[name] + 0.5 * (state[name] - before[name])
            if name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")
            else None
        )
        assert value.equal(state[name] if moved is None else moved), name
        assert not value.requires_grad and value.data_ptr() != state[name].data_ptr()
    new.load_state_dict(found)
    everything = nesterov_extrapolate(state, before, 0.5, trainable=lambda name: name == "2.bias")
    assert everything["0.weight"].equal(state["0.weight"]) and not everything["2.bias"].equal(state["2.bias"])


def test_counters_are_copied() -> None:
    new = {"w": torch.ones(2), "n": torch.tensor(7), "flag": torch.tensor([True, False])}
    found = nesterov_extrapolate(new, {"w": torch.zeros(2)}, 0.5)  # the old ones need not have them
    assert found["w"].tolist() == [1.5, 1.5] and found["n"] == 7 and found["flag"].tolist() == [True, False]
    found["n"] += 1
    assert new["n"] == 7


@pytest.mark.parametrize("target", ["new", "old", "other", "bfloat16"])
def test_written_in_place(target) -> None:
    new, old = small_model(0), small_model(1)
    expected = nesterov_extrapolate(new, old, 0.3)
    out = {"new": new, "old": old, "other": small_model(2), "bfloat16": small_model(2).bfloat16()}[target]
    addresses = [p.data_ptr() for p in out.parameters()]
    assert nesterov_extrapolate(new, old, 0.3, out=out) is out
    assert [p.data_ptr() for p in out.parameters()] == addresses
    assert all(p.requires_grad for p in out.parameters())
    for name, value in out.state_dict().items():
        assert value.equal(expected[name].to(value.dtype)), name


@pytest.mark.parametrize("chunk", [1, 5, 1 << 26])
def test_tied_weights_move_once(monkeypatch, chunk) -> None:
    monkeypatch.setattr(optim, "_CHUNK", chunk)

    class Tied(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.embedding, self.free, self.head = nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3, bias=False)
            self.head.weight = self.embedding.weight
            with torch.no_grad():
                for p in self.parameters():
                    p.fill_(fill)

    new, old = Tied(1.0), Tied(0.0)
    found = nesterov_extrapolate(new, old, 0.5)
    assert found["head.weight"] is found["embedding.weight"] and (found["head.weight"] == 1.5).all()
    assert found["free.weight"] is not found["free.bias"]
    nesterov_extrapolate(new, old, 0.5, out=new)
    assert (new.head.weight == 1.5).all() and new.head.weight is new.embedding.weight and (new.free.weight == 1.5).all()
    again = nesterov_extrapolate(Tied(1.0), {k: v.clone() for k, v in old.state_dict().items()}, 0.5)
    assert again["head.weight"] is again["embedding.weight"]
    different = {**old.state_dict(), "head.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' are one tensor, but differ in params_old"):
        nesterov_extrapolate(Tied(1.0), different, 0.5)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_views_of_one_storage(monkeypatch, chunk) -> None:
    monkeypatch.setattr(optim, "_CHUNK", chunk)
    flat, before = torch.arange(12.0), torch.zeros(12)
    expected = flat * 1.5

    def views(t):
        return [t[:5], t[5:]]

    def transposed(t):
        return [t.view(3, 4), t.view(3, 4).t()]  # one tensor, seen in two ways

    for see in (views, transposed):
        new = flat.clone()
        nesterov_extrapolate(see(new), see(before), 0.5, out=see(new))
        assert new.equal(expected)
        assert torch.cat([t.reshape(-1) for t in nesterov_extrapolate(see(flat), see(before), 0.5)]).equal(
            torch.cat([t.reshape(-1) for t in see(expected)])
        )
    new = flat.clone()  # what is written for one entry is read by the next
    nesterov_extrapolate([new[:6], new[6:]], [before[:6], before[6:]], 0.5, out=[new[6:], new[:6]])
    assert new.equal(torch.cat([expected[6:], expected[:6]]))


def lora_state(generator, r=2):
    return {
        "q.base_layer.weight": torch.zeros(5, 4, dtype=F64),
        "q.lora_A.default.weight": torch.randn(r, 4, dtype=F64, generator=generator),
        "q.lora_B.default.weight": torch.randn(5, r, dtype=F64, generator=generator),
    }


def test_lora_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = lora_state(generator), lora_state(generator)
    with pytest.raises(
        ValueError, match=r"params_new has LoRA factors, such as q.lora_A.default.weight: .* Merge the adapters"
    ):
        nesterov_extrapolate(new, old, 0.3)

    def product(state):
        return state["q.lora_B.default.weight"] @ state["q.lora_A.default.weight"]

    exact = product(new) + 0.3 * (product(new) - product(old))
    stacked = nesterov_extrapolate(new, old, 0.3, lora="stack")
    assert_close(product(stacked), exact, rtol=0, atol=1e-14)
    assert stacked["q.lora_A.default.weight"].shape == (4, 4) and list(stacked) == list(new)
    each = nesterov_extrapolate(new, old, 0.3, lora="factors")
    a = "q.lora_A.default.weight"
    assert each[a].equal(new[a] + 0.3 * (new[a] - old[a])) and (product(each) - exact).abs().max() > 0.1
    frozen = nesterov_extrapolate(new, old, 0.3, trainable=lambda name: "lora" not in name)
    assert frozen[a].equal(new[a])
    with pytest.raises(ValueError, match="out is given; lora='stack' doubles the rank"):
        nesterov_extrapolate(new, old, 0.3, lora="stack", out=new)
    with pytest.raises(ValueError, match=r"has 'q.lora_A.default.weight' but no 'q.lora_B.default.weight' to extrapolate"):
        nesterov_extrapolate(new, old, 0.3, lora="stack", trainable=lambda name: "lora_B" not in name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["params_new", "params_old"])
def test_a_bad_weight_is_named_before_anything_is_written(bad, where) -> None:
    given = {
        side: {"a": torch.ones(3), "b.weight": torch.ones(3), "n": torch.tensor(1)} for side in ("params_new", "params_old")
    }
    given[where]["b.weight"][1] = bad
    out = {"a": torch.zeros(3), "b.weight": torch.zeros(3), "n": torch.tensor(0)}
    with pytest.raises(ValueError, match=rf"{where}\['b.weight'\] has a NaN or an infinity"):
        nesterov_extrapolate(**given, alpha=0.5, out=out)
    assert not any(t.any() for t in out.values())


def test_an_overflow_is_named() -> None:
    big = torch.tensor([60000.0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"out\['0'\] overflows its dtype"):
        nesterov_extrapolate([big], [-big], 0.5)
    assert nesterov_extrapolate([big.float()], [-big.float()], 0.5)[0] == 120000


def test_shapes_of_all_kinds() -> None:
    new = [torch.zeros(0, 3), torch.tensor(2.0), torch.ones(2, dtype=torch.complex64)]
    old = [torch.zeros(0, 3), torch.tensor(1.0), torch.zeros(2, dtype=torch.complex64)]
    found = nesterov_extrapolate(new, old, 0.5)
    assert found[0].shape == (0, 3) and found[1] == 2.5 and found[2].tolist() == [1.5, 1.5]
    assert nesterov_extrapolate([], [], 0.5) == [] and nesterov_extrapolate({}, {}, 0.5) == {}


def test_on_a_gpu_with_the_old_weights_elsewhere(device) -> None:
    new, old = small_model(0), small_model(1)
    expected = nesterov_extrapolate(new, old, 0.3)
    found = nesterov_extrapolate(new.to(device), old, 0.3)
    for name, value in found.items():
        assert value.device.type == device
        assert_close(value.cpu(), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([torch.ones(1)], [torch.ones(1)], 1.0), {}, ValueError, r"alpha is 1.0; a number in \[0, 1\)"),
        (([torch.ones(1)], [torch.ones(1)], -0.1), {}, ValueError, "alpha is -0.1"),
        (([torch.ones(1)], [torch.ones(1)], math.nan), {}, ValueError, "alpha is nan"),
        (([torch.ones(1)], [torch.ones(1)]), {"lora": "merged"}, ValueError, "lora is 'merged'; .* did you mean 'merge'"),
        (([torch.ones(1)], []), {}, ValueError, "params_old has no '0', which params_new has"),
        (({"w.a": torch.ones(1)}, {"w.b": torch.ones(1)}), {}, ValueError, r"params_old has no 'w.a'.*; did you mean 'w.b'\?"),
        (([torch.ones(1)], [torch.ones(2)]), {}, ValueError, r"params_old\['0'\] has shape \[2\]; \[1\]"),
        (([torch.ones(1)], [torch.ones(1)]), {"out": []}, ValueError, "out has no '0'"),
        ((torch.ones(1), [torch.ones(1)]), {}, TypeError, "params_new is a Tensor; a module, tensors by name"),
        (([torch.ones(1)], [1.0]), {}, TypeError, "params_old is a list; a module"),
    ],
)  # fmt: skip
def test_extrapolations_refused(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        nesterov_extrapolate(*arguments, **options)


# ---- extragradient

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "asgd": lambda p: torch.optim.ASGD(p, t0=1),
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
}


class Counter(torch.optim.Optimizer):
    """SGD whose step counts in its options and replaces what is in its state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["seen"] = [group["k"]]
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] / group["k"])
                state = self.state[p]
                state["history"] = [*state.get("history", []), p.clone()]
                state["nested"] = {"step": group["k"], "mean": p.mean()}


OPTIMIZERS["counter"] = lambda p: Counter(p, 0.1)


def make(name, steps=0):
    """Three parameters in two groups after some steps, and the optimiser."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 2))]
    optimizer = OPTIMIZERS[name]([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}])
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
    return params, optimizer


def gradients(params, seed) -> None:
    torch.manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn_like(p)


def frozen(params, optimizer):
    """Everything there is, by value."""
    return copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))


def assert_same(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.equal(other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_comes_back_bit_for_bit(name, steps) -> None:
    params, optimizer = make(name, steps)
    before = frozen(params, optimizer)
    half = ExtragradientStep(optimizer)
    gradients(params, 7)
    half.extrapolate()
    there = frozen(params, optimizer)
    assert not any(p.equal(b) for p, b in zip(params, before[0], strict=True))
    half.restore()
    assert_same(frozen(params, optimizer), before)
    gradients(params, 8)
    half.step()

    others, plain = make(name, steps)
    gradients(others, 7)
    ahead, ahead_optimizer = make(name, steps)
    gradients(ahead, 7)
    ahead_optimizer.step()
    assert_same(there, frozen(ahead, ahead_optimizer))
    gradients(others, 8)
    plain.step()
    assert_same(frozen(params, optimizer), frozen(others, plain))


def test_state_made_by_the_first_step_is_gone_again() -> None:
    params, optimizer = make("adam")
    half = ExtragradientStep(optimizer)
    gradients(params, 0)
    half.extrapolate()
    assert len(optimizer.state) == 3
    half.restore()
    assert not optimizer.state


def test_tensors_stay_the_same_ones() -> None:
    params, optimizer = make("adam", 1)
    addresses = [p.data_ptr() for p in params], [optimizer.state[p]["exp_avg"].data_ptr() for p in params]
    half = ExtragradientStep(optimizer)
    half.extrapolate()
    half.restore()
    assert addresses == ([p.data_ptr() for p in params], [optimizer.state[p]["exp_avg"].data_ptr() for p in params])


def test_step_restores_by_itself_and_gradients_stay() -> None:
    params, optimizer = make("momentum", 1)
    half = ExtragradientStep(optimizer)
    gradients(params, 1)
    half.extrapolate()
    gradients(params, 2)
    kept = [p.grad for p in params]
    half.step()
    assert all(p.grad is g for p, g in zip(params, kept, strict=True))
    others, plain = make("momentum", 1)
    gradients(others, 2)
    plain.step()
    assert_same(frozen(params, optimizer), frozen(others, plain))


def test_a_scheduler_in_between_keeps_its_learning_rate() -> None:
    params, optimizer = make("counter", 1)
    half = ExtragradientStep(optimizer)
    gradients(params, 1)
    half.extrapolate()
    assert [group["k"] for group in optimizer.param_groups] == [2, 2]
    optimizer.param_groups[0]["lr"] = 0.01
    half.restore()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.05]
    assert [(group["k"], group["seen"]) for group in optimizer.param_groups] == [(1, [1]), (1, [1])]
    fresh, optimizer = make("counter")
    half = ExtragradientStep(optimizer)
    gradients(fresh, 1)
    half.extrapolate()
    half.restore()
    assert all("seen" not in group for group in optimizer.param_groups)


def test_a_step_that_fails_leaves_everything() -> None:
    params, optimizer = make("counter", 1)
    before = frozen(params, optimizer)
    params[2].grad = None  # its step fails there, after the first group moved
    half = ExtragradientStep(optimizer)
    with pytest.raises(TypeError):
        half.extrapolate()
    assert half.phase == "start"
    assert_same([p.detach() for p in params], before[0])
    assert_same(optimizer.state_dict()["state"], before[1]["state"])


def test_a_copy_on_the_host(device) -> None:
    params, optimizer = make("adam", 1)
    for p in params:
        p.data = p.data.to(device)
    optimizer.load_state_dict(optimizer.state_dict())  # moves the state along
    before = frozen(params, optimizer)
    half = ExtragradientStep(optimizer, device="cpu")
    for p in params:
        p.grad = torch.ones_like(p)
    half.extrapolate()
    assert all(t.device.type == "cpu" for t in half.state_dict()["kept"]["params"])
    half.restore()
    assert_same(frozen(params, optimizer), before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ["adam", "counter"])
def test_saved_on_the_way_and_loaded(name, steps) -> None:
    params, optimizer = make(name, steps)
    before = frozen(params, optimizer)
    half = ExtragradientStep(optimizer)
    gradients(params, 7)
    half.extrapolate()
    file = io.BytesIO()
    state = [p.detach() for p in params], optimizer.state_dict(), half.state_dict()
    torch.save(state, file)
    half.restore()  # what was saved is a copy

    file.seek(0)
    weights, optimizer_state, half_state = torch.load(file, weights_only=True)
    others, other_optimizer = make(name)
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    other_optimizer.load_state_dict(optimizer_state)
    resumed = ExtragradientStep(other_optimizer)
    resumed.load_state_dict(half_state)
    assert resumed.phase == "extrapolated"
    resumed.restore()
    assert_same(frozen(others, other_optimizer), before)
    resumed.load_state_dict(ExtragradientStep(optimizer).state_dict())
    assert resumed.phase == "start"


def test_order_of_calls() -> None:
    params, optimizer = make("sgd")
    gradients(params, 0)
    half = ExtragradientStep(optimizer)
    with pytest.raises(RuntimeError, match=r"restore\(\) was called in phase 'start'; extrapolate\(\) has to come before"):
        half.restore()
    with pytest.raises(RuntimeError, match=r"step\(\) was called in phase 'start'"):
        half.step()
    half.extrapolate()
    with pytest.raises(RuntimeError, match=r"extrapolate\(\) was called in phase 'extrapolated'; step\(\) has to come before"):
        half.extrapolate()
    half.restore()
    with pytest.raises(RuntimeError, match=r"restore\(\) was called in phase 'restored'"):
        half.restore()
    with pytest.raises(RuntimeError, match=r"extrapolate\(\) was called in phase 'restored'"):
        half.extrapolate()
    half.step()
    half.extrapolate()


def test_optimisers_and_states_refused() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="optimizer is LBFGS, whose step evaluates the loss itself"):
        ExtragradientStep(torch.optim.LBFGS(params))
    with pytest.raises(TypeError, match=r"optimizer is a list; a torch.optim.Optimizer is expected"):
        ExtragradientStep(params)
    half = ExtragradientStep(torch.optim.SGD(params))
    with pytest.raises(ValueError, match="state has phase 'half'; accepted: 'start', 'extrapolated', 'restored'"):
        half.load_state_dict({"phase": "half"})
    with pytest.raises(ValueError, match="state is extrapolated and has no copy"):
        half.load_state_dict({"phase": "extrapolated", "kept": None})
    with pytest.raises(ValueError, match=r"state has parameters of shapes \[\[3\]\]; those of the optimizer are \[\[2\]\]"):
        half.load_state_dict({"phase": "extrapolated", "kept": {"params": [torch.ones(3)], "state": {}, "options": [{}]}})
    assert prefkern.ExtragradientStep is ExtragradientStep


# ---- EGPO's own numbers


def test_worked_extragradient_step_of_egpo() -> None:
    preference = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]], dtype=F64)
    theta = nn.Parameter(torch.tensor([0.2, -0.1, 0.4], dtype=F64))
    ref = torch.log_softmax(torch.tensor([0.0, 0.3, -0.3], dtype=F64), 0)
    beta = 0.1

    def loss(opponent):
        d = torch.log_softmax(theta, 0) - ref - preference @ opponent / beta
        return (d[:, None] - d[None, :]).square().mean()

    half = ExtragradientStep(torch.optim.SGD([theta], lr=0.02))
    value = loss(torch.softmax(theta.detach(), 0))
    assert_close(value.detach(), torch.tensor(0.03613259042, dtype=F64), rtol=0, atol=1e-10)
    value.backward()
    assert_close(theta.grad, torch.tensor([0.2489516358, -0.1656352578, -0.08331637804], dtype=F64), rtol=0, atol=1e-10)
    half.extrapolate()
    assert_close(theta.detach(), torch.tensor([0.1950209673, -0.09668729484, 0.4016663276], dtype=F64), rtol=0, atol=1e-10)
    opponent = torch.softmax(theta.detach(), 0)
    half.restore()
    theta.grad = None
    loss(opponent).backward()
    half.step()
    assert_close(theta.detach(), torch.tensor([0.1950302788, -0.09649716791, 0.4014668891], dtype=F64), rtol=0, atol=1e-10)
