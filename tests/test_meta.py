"""The inner loss of a learned policy update and its recurrent network against their float64 definitions, first and second
derivatives, and everything they must refuse."""

import math
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import lpg_inner_loss, reference, reverse_gru_reset

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN = math.nan
OPS = torch.ops.prefkern

each_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
GRU_INPUTS = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_n")


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device), rtol=0, atol=tolerance)


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


def rollout(*rows, actions=3, width=4, device="cpu", dtype=F32):
    """probs, actions, y, pi_hat, y_hat."""
    probs, y, y_hat = (torch.randn(*rows, n).softmax(-1) for n in (actions, width, width))
    tensors = probs, torch.randint(actions, rows), y, torch.randn(rows), y_hat
    return tuple(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in tensors)


def leaves(tensors):
    return tuple(t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in tensors)


def network(rows, steps, inputs, hidden, device="cpu", dtype=F32, scale=0.5):
    """By name, with terminal steps."""
    shapes = ((rows, steps, inputs), (3 * hidden, inputs), (3 * hidden, hidden), (3 * hidden,), (hidden,))
    given = {name: (scale * torch.randn(shape)).to(device, dtype) for name, shape in zip(GRU_INPUTS, shapes, strict=True)}
    return {**given, "done": torch.rand(rows, steps).to(device) < 0.3}


def states_and_gradients(function, given, upstream):
    fresh = {name: t.detach().clone().requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    out = function(**fresh)
    grads = torch.autograd.grad(out, [fresh[name] for name in GRU_INPUTS], upstream.to(out.dtype))
    return out.detach(), dict(zip(GRU_INPUTS, grads, strict=True))


# ------------------------------------------------------------------------------------------------------------ worked loss

PROBS, ACTIONS, Y = f64([0.2, 0.8], [0.5, 0.5]), torch.tensor([1, 0]), f64([0.6, 0.4], [0.1, 0.9])
PI_HAT, Y_HAT = f64(1.5, -0.5), f64([0.5, 0.5], [0.3, 0.7])


def test_worked_loss_and_gradients():
    probs, _, y, pi_hat, y_hat = given = leaves((PROBS, ACTIONS, Y, PI_HAT, Y_HAT))
    out = lpg_inner_loss(*given)
    close(out.loss.detach(), 0.0400434545159, 1e-12)
    close(out.metrics["kl"], 0.0682286369731, 1e-12)
    grads = torch.autograd.grad(out.loss, (probs, y, pi_hat, y_hat))
    expected = (
        [[0, 0.9374999883], [-0.49999999, 0]],
        [[0.2955803841985, 0.1942141071714], [-0.0246530805004, 0.3128286034988]],
        [-0.1115717694071, -0.3465735802800],
        [[-0.299999994, -0.199999996], [-0.0833333306, -0.3214285668]],
    )
    for grad, value in zip(grads, expected, strict=True):
        close(grad, value, 1e-10)


def test_sign_of_the_paper():
    out = lpg_inner_loss(PROBS, ACTIONS, Y, PI_HAT, Y_HAT, sign="paper")
    close(out.loss, 0.0281851824572, 1e-12)
    close(out.metrics["policy"], (0.0400434545159 - 0.0281851824572) / 2, 1e-12)


def test_zero_probabilities_have_a_finite_logarithm(device):
    probs, y = torch.tensor([[0.0, 1.0]], device=device), torch.tensor([[1.0, 0.0]], device=device)
    out = lpg_inner_loss(probs, torch.zeros(1, dtype=torch.int64, device=device), y, torch.ones(1, device=device), y.flip(1))
    close(out.metrics["policy"], -18.4206807, 1e-5)
    close(out.metrics["kl"], 18.4206807, 1e-5)


# ----------------------------------------------------------------------------------------------- loss against definitions


@each_dtype
def test_loss(device, dtype):
    skip_float64_on_cuda(device, dtype)
    for rows, actions, width, sign in (
        ((1,), 1, 1, "code"),
        ((3, 5), 4, 8, "paper"),
        ((7, 41), 3, 13, "code"),
        ((600,), 2, 5, "code"),
    ):
        given = leaves(rollout(*rows, actions=actions, width=width, device=device, dtype=dtype))
        exact = leaves(t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in given)
        out, truth = lpg_inner_loss(*given, sign=sign, alpha_y=0.7), reference.lpg_inner_loss(*exact, sign=sign, alpha_y=0.7)
        tight = dtype == F64
        assert out.loss.dtype == (F64 if tight else F32) and out.loss.shape == ()
        close(out.loss.detach().cpu(), truth.loss.detach(), 1e-12 if tight else 3e-6)
        for name, value in truth.metrics.items():
            close(out.metrics[name].cpu(), value, 1e-12 if tight else 3e-6)
        wanted = [t for t in given if t.is_floating_point()]
        grads = torch.autograd.grad(out.loss, wanted, 3 * torch.ones_like(out.loss))
        truths = torch.autograd.grad(truth.loss, [t for t in exact if t.is_floating_point()], 3 * torch.ones_like(truth.loss))
        for leaf, grad, value in zip(wanted, grads, truths, strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
            tolerance = {F64: 1e-12, F32: 3e-6}.get(dtype, 2**-7) * max(0.1, value.abs().max().item())
            close(grad.cpu().double(), value, tolerance)
        assert torch.equal(lpg_inner_loss(*(t.detach() for t in given), sign=sign, alpha_y=0.7).loss, out.loss)


def test_gradients_and_their_gradients_in_float64():
    tensors = rollout(2, 3, dtype=F64)
    given = leaves(tensors)

    def loss(probs, y, pi_hat, y_hat):
        return lpg_inner_loss(probs, tensors[1], y, pi_hat, y_hat, alpha_y=0.7, sign="paper").loss

    inputs = [t for t in given if t.is_floating_point()]
    assert torch.autograd.gradcheck(loss, inputs, nondet_tol=0)
    assert torch.autograd.gradgradcheck(loss, inputs, nondet_tol=0)
    for k in range(4):  # each alone: what nobody asks for is left out
        alone = [t if i == k else t.detach() for i, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(loss, alone) and torch.autograd.gradgradcheck(loss, alone)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_second_derivatives_against_the_definition(device, dtype):
    """Of the gradient by the agent's part, as a step of the agent uses it."""
    skip_float64_on_cuda(device, dtype)
    tensors = rollout(9, 37, width=8, device=device, dtype=dtype)
    upstream = [torch.randn(t.shape) for t in (tensors[0], tensors[2])]
    found = []
    for function, given in (
        (lpg_inner_loss, leaves(tensors)),
        (reference.lpg_inner_loss, leaves(t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors)),
    ):
        loss = function(*given).loss
        grads = torch.autograd.grad(loss, (given[0], given[2]), create_graph=True)
        total = sum((g * u.to(g)).sum() for g, u in zip(grads, upstream, strict=True))
        found.append(torch.autograd.grad(total, [t for t in given if t.is_floating_point()]))
    for ours, truth in zip(*found, strict=True):
        close(ours.cpu().double(), truth, (1e-12 if dtype == F64 else 1e-5) * max(1e-3, truth.abs().max().item()))


def test_a_third_differentiation_is_refused():
    given = leaves(rollout(4, dtype=F64))
    (grad,) = torch.autograd.grad(lpg_inner_loss(*given).loss, given[0], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), given[3], create_graph=True)
    with pytest.raises(RuntimeError, match="lpg_inner_loss_second cannot be differentiated twice"):
        second.sum().backward()


def test_equal_distributions_have_no_divergence():
    """In either type, whatever the rows; and no logit of the prediction is moved."""
    logits = torch.randn(50, 6, dtype=F64).requires_grad_()
    y = logits.softmax(-1)
    probs, actions, _, pi_hat, _ = rollout(50, dtype=F64)
    out = lpg_inner_loss(probs, actions, y, pi_hat, y.detach())
    assert out.metrics["kl"].item() == 0
    close(torch.autograd.grad(out.loss, logits)[0], torch.zeros(50, 6), 1e-9)
    for width in (2, 8, 32):
        probs, actions, y, pi_hat, y_hat = rollout(200, width=width)
        assert lpg_inner_loss(probs, actions, y, pi_hat, y_hat).metrics["kl"].item() >= -1e-7
        assert lpg_inner_loss(probs, actions, y, pi_hat, y + 1e-6 * torch.randn_like(y)).metrics["kl"].item() >= -1e-6


def test_nan_shows_in_the_loss_and_in_its_row(device):
    probs, actions, y, pi_hat, y_hat = rollout(300, device=device)
    pi_hat[7] = NAN
    given = leaves((probs, actions, y, pi_hat, y_hat))
    out = lpg_inner_loss(*given)
    assert out.loss.isnan() and not out.metrics["kl"].isnan()
    grads = torch.autograd.grad(out.loss, (given[0], given[2]))
    assert torch.equal(grads[0].isnan().any(-1), torch.arange(300, device=device) == 7) and not grads[1].isnan().any()


# ----------------------------------------------------------------------------------------------- the recurrent network


@each_dtype
def test_states_and_gradients(device, dtype):
    skip_float64_on_cuda(device, dtype)
    for rows, steps, inputs, hidden in ((1, 1, 1, 1), (3, 5, 2, 7), (37, 4, 5, 24), (19, 9, 3, 33)):
        given = network(rows, steps, inputs, hidden, device, dtype, scale=0.5 if hidden < 20 else 0.2)
        upstream = torch.randn(rows, steps, hidden, device=device)
        out, grads = states_and_gradients(reverse_gru_reset, given, upstream)
        exact = {name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in given.items()}
        expected, truth = states_and_gradients(reference.reverse_gru_reset, exact, upstream.cpu())
        tight = dtype == F64
        assert out.dtype == (F64 if tight else F32)
        close(out.cpu().double(), expected, 1e-12 if tight else 2e-6)
        for name, value in truth.items():
            assert grads[name].dtype == dtype
            tolerance = {F64: 1e-12, F32: 1e-5}.get(dtype, 2**-7) * max(1e-3, value.abs().max().item())
            close(grads[name].cpu().double(), value, tolerance)


def test_it_is_a_gru_on_the_reversed_sequence():
    torch_gru = torch.nn.GRU(3, 6, batch_first=True).double()
    x = torch.randn(4, 5, 3, dtype=F64)
    bias = torch_gru.bias_ih_l0 + torch.cat([torch_gru.bias_hh_l0[:12], torch.zeros(6)])
    out = reverse_gru_reset(x, None, torch_gru.weight_ih_l0, torch_gru.weight_hh_l0, bias, torch_gru.bias_hh_l0[12:])
    close(out, torch_gru(x.flip(1))[0].flip(1).detach(), 1e-12)


def test_gradcheck_of_the_network():
    given = network(2, 4, 2, 3, dtype=F64)
    inputs = [given[name].requires_grad_() for name in GRU_INPUTS]
    for done in (given["done"], None):
        assert torch.autograd.gradcheck(
            lambda *t, done=done: reverse_gru_reset(done=done, **dict(zip(GRU_INPUTS, t, strict=True))), inputs, nondet_tol=0
        )


def test_biases_may_be_left_out():
    given = network(3, 4, 2, 5, dtype=F64)
    zero = {**given, "bias_ih": torch.zeros(15, dtype=F64), "bias_n": torch.zeros(5, dtype=F64)}
    out = reverse_gru_reset(given["x"], given["done"], given["weight_ih"], given["weight_hh"])
    assert torch.equal(out, reverse_gru_reset(**zero))


def test_nothing_behind_a_terminal_step_reaches_it(device):
    given = network(6, 8, 3, 10, device)
    given["done"][:] = torch.arange(8, device=device) == 4
    leaf = given["x"].clone().requires_grad_()
    out = reverse_gru_reset(**{**given, "x": leaf})
    later = given["x"].clone()
    later[:, 5:] = torch.randn(6, 3, 3, device=device)
    changed = reverse_gru_reset(**{**given, "x": later})
    assert torch.equal(changed[:, :5], out[:, :5]) and not torch.equal(changed[:, 5:], out[:, 5:])
    (grad,) = torch.autograd.grad(out[:, :5].sum(), leaf)
    assert (grad[:, 5:] == 0).all() and (grad[:, :5] != 0).any()


def test_no_rows_and_no_steps():
    for rows, steps in ((0, 3), (2, 0)):
        given = network(rows, steps, 2, 4)
        out, grads = states_and_gradients(reverse_gru_reset, given, torch.zeros(rows, steps, 4))
        assert out.shape == (rows, steps, 4) and (grads["weight_hh"] == 0).all() and (grads["bias_n"] == 0).all()


def test_gradients_of_the_network_are_not_differentiated(device):
    given = network(2, 3, 2, 4, device)
    leaf = given["weight_hh"].clone().requires_grad_()
    out = reverse_gru_reset(**{**given, "weight_hh": leaf})
    (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="reverse_gru_backward cannot be differentiated twice"):
        grad.sum().backward()


# ------------------------------------------------------------------------------------------------------- as ops of PyTorch


def test_bits_do_not_depend_on_threads_or_layout(threads):
    given, given_gru = rollout(1500, 3, width=8), network(70, 4, 5, 40, scale=0.3)
    upstream = torch.randn(70, 4, 40)
    results = []
    for count in (1, 2, 3):
        threads(count)
        fresh = leaves(given)
        loss = lpg_inner_loss(*fresh).loss
        grads = torch.autograd.grad(loss, (fresh[0], fresh[2]), create_graph=True)
        second = torch.autograd.grad((grads[0].square().sum() + grads[1].square().sum()), (fresh[3], fresh[4]))
        out, by_name = states_and_gradients(reverse_gru_reset, given_gru, upstream)
        results.append([loss, *grads, *second, out, *by_name.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given]
    assert torch.equal(lpg_inner_loss(*strided).loss, results[0][0])


def test_opcheck(device):
    dtype = F32 if device == "cuda" else F64
    probs, actions, y, pi_hat, y_hat = given = rollout(5, device=device, dtype=dtype)
    g = torch.tensor(0.5, device=device, dtype=dtype)
    opcheck(OPS.lpg_inner_loss.default, (*leaves(given), 0.5, 1.0))
    opcheck(OPS.lpg_inner_loss_fwd.default, (*given, 0.5, 1.0))
    opcheck(OPS.lpg_inner_loss_backward.default, (g.clone().requires_grad_(), *leaves(given), 0.5, -1.0, 7))
    above = (torch.randn_like(probs), None, torch.randn_like(pi_hat), torch.randn_like(y_hat))
    opcheck(OPS.lpg_inner_loss_second.default, (*above, g, probs, actions, y, pi_hat, y_hat, 0.5, 1.0, 15))
    gates, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((2, 3, 12), (12, 4), (4,)))
    done = torch.rand(2, 3, device=device) < 0.5
    opcheck(OPS.reverse_gru.default, (*leaves((gates, done, weight, bias)), True))
    opcheck(OPS.reverse_gru_fwd.default, (gates, None, weight, bias, False))
    states, saved = OPS.reverse_gru(gates, done, weight, bias, True)
    opcheck(OPS.reverse_gru_backward.default, (torch.randn_like(states), states, saved, done, weight, True))


def test_one_graph_for_any_number_of_rows(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(probs, actions, y, pi_hat, y_hat, x, done, weight_ih, weight_hh):
        h = reverse_gru_reset(x, done, weight_ih, weight_hh)
        return lpg_inner_loss(probs, actions, y, pi_hat * h.mean(-1), y_hat).loss

    run = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (8, 11, 13):
        tensors = rollout(rows, 3, device=device)
        net = network(rows, 3, 2, 5, device)
        both = [leaves((*tensors, net["x"], net["done"], net["weight_ih"], net["weight_hh"])) for _ in range(2)]
        compiled, eager = run(*both[0]), step(*both[1])
        assert torch.equal(compiled, eager)
        compiled.backward()
        eager.backward()
        for a, b in zip(*both, strict=True):
            if a.is_floating_point():
                assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)
    assert counter.frame_count <= 2


def test_meta_tensors():
    probs, actions, y, pi_hat, y_hat = (t.to("meta") for t in rollout(4, 6))
    assert lpg_inner_loss(probs.half(), actions, y, pi_hat, y_hat).loss.dtype == F32
    net = {name: t.to("meta") for name, t in network(3, 4, 2, 5).items()}
    assert reverse_gru_reset(**net).shape == (3, 4, 5)


def test_autocast_does_not_round(device):
    given = network(3, 4, 2, 5, device)
    with torch.autocast(device, torch.bfloat16):
        out = reverse_gru_reset(**given)
    assert torch.equal(out, reverse_gru_reset(**given))


def test_nothing_is_saved_without_a_gradient(op_log):
    given = network(2, 3, 2, 4)
    with torch.no_grad():
        lpg_inner_loss(*rollout(4))
        reverse_gru_reset(**{name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()})
    assert op_log.names() == ["lpg_inner_loss_fwd", "reverse_gru_fwd"]
    assert op_log.args("reverse_gru_fwd")[-1] is False


# ---------------------------------------------------------------------------------------------------------------- refusals


def refused(error, message, call):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_what_the_loss_refuses():
    probs, actions, y, pi_hat, y_hat = rollout(2, 3)

    def with_(**change):
        given = {"probs": probs, "actions": actions, "y": y, "pi_hat": pi_hat, "y_hat": y_hat, **change}
        return lambda: lpg_inner_loss(**given)

    for name in ("probs", "actions", "y", "pi_hat", "y_hat"):
        refused(TypeError, f"{name} is a list; a torch.Tensor is expected", with_(**{name: [1.0]}))
    refused(ValueError, "actions has shape [3]; probs has shape [2, 3, 3], so [2, 3] is expected", with_(actions=actions[0]))
    refused(ValueError, "pi_hat has shape [2, 3, 1]", with_(pi_hat=pi_hat[..., None]))
    refused(ValueError, "y has shape [2, 2, 4]; probs has shape [2, 3, 3], so [2, 3, W] is expected", with_(y=y[:, :2]))
    refused(ValueError, "y_hat has shape [2, 3, 3]; y has shape [2, 3, 4], so the same", with_(y_hat=y_hat[..., :3]))
    refused(ValueError, "sign is 'papr'; accepted: 'code', 'paper'; did you mean 'paper'?", with_(sign="papr"))
    refused(TypeError, "alpha_y is 'x'; a number is expected", with_(alpha_y="x"))
    refused(ValueError, "alpha_y is inf; it must be finite", with_(alpha_y=math.inf))
    refused(TypeError, "actions has dtype Float; accepted: int64, int32", with_(actions=actions.float()))
    refused(TypeError, "y has dtype Double; probs has dtype Float", with_(y=y.double()))
    refused(TypeError, "probs has dtype Long", with_(probs=probs.long()))
    for bad in (3, -1):
        wrong = actions.clone()
        wrong[1, 0] = bad
        refused(ValueError, f"actions[3] of the flattened rows is {bad}; it must lie in [0, 3)", with_(actions=wrong))
    empty = rollout(0, 3)
    refused(ValueError, "probs has shape [0, 3]; a mean needs at least one row", lambda: lpg_inner_loss(*empty))
    refused(ValueError, "probs has shape []", with_(probs=torch.tensor(1.0)))


def test_what_the_network_refuses():
    given = network(2, 3, 4, 5)

    def with_(**change):
        return lambda: reverse_gru_reset(**{**given, **change})

    refused(TypeError, "x is a NoneType; a torch.Tensor is expected", with_(x=None))
    refused(TypeError, "done is a list", with_(done=[True]))
    refused(ValueError, "x has shape [2, 3]; [B, T, I] is expected", with_(x=given["x"][..., 0]))
    refused(ValueError, "weight_ih has shape [15, 3]; [15, 4] is expected", with_(weight_ih=given["weight_ih"][:, :3]))
    refused(ValueError, "weight_hh has shape [14, 5]; [15, 5] is expected", with_(weight_hh=given["weight_hh"][:14]))
    refused(ValueError, "weight_hh has shape [75]; [3H, H] is expected", with_(weight_hh=given["weight_hh"].reshape(-1)))
    refused(ValueError, "bias_ih has shape [5]; [15] is expected", with_(bias_ih=given["bias_n"]))
    refused(ValueError, "bias_n has shape [15]; expected [5]", with_(bias_n=given["bias_ih"]))
    refused(TypeError, "done has dtype Float; accepted: bool", with_(done=given["done"].float()))
    refused(ValueError, "done has shape [2, 2]; expected [2, 3]", with_(done=given["done"][:, :2]))
    refused(ValueError, "weight_hh is float64 on cpu and x float32 on cpu", with_(weight_hh=given["weight_hh"].double()))
    refused(TypeError, "bias_n has dtype Double", with_(bias_n=given["bias_n"].double()))


def test_wrong_bits_of_the_ops():
    given = rollout(3)
    g = torch.tensor(1.0)
    refused(RuntimeError, "needs is 16; accepted: 0 to 15", lambda: OPS.lpg_inner_loss_backward(g, *given, 0.5, 1.0, 16))
    refused(RuntimeError, "sign is 2; accepted: 1, -1", lambda: OPS.lpg_inner_loss_fwd(*given, 0.5, 2.0))
    refused(RuntimeError, "g has shape [2]", lambda: OPS.lpg_inner_loss_backward(torch.ones(2), *given, 0.5, 1.0, 15))
    with pytest.raises(ValueError, match="with_grad is False"):
        OPS.reverse_gru(torch.randn(1, 2, 3).requires_grad_(), None, torch.randn(3, 1), torch.zeros(1), False)


@only_cuda
def test_actions_on_cuda(device, validation):
    probs, actions, y, pi_hat, y_hat = rollout(300, device=device)
    actions[5] = 3
    leaf = probs.clone().requires_grad_()
    out = lpg_inner_loss(leaf, actions, y, pi_hat, y_hat)
    assert out.loss.isnan()
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(grad.isnan().all(-1), torch.arange(300, device=device) == 5)
    validation(True)
    refused(ValueError, "actions[5] is 3; it must lie in [0, 3)", lambda: lpg_inner_loss(probs, actions, y, pi_hat, y_hat))


@only_cuda
def test_graph_capture(device):
    given, net = rollout(40, 3, device=device), network(6, 4, 3, 16, device)
    lpg_inner_loss(*given), reverse_gru_reset(**net)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, states = lpg_inner_loss(*given).loss, reverse_gru_reset(**net)
    graph.replay()
    assert torch.equal(loss, lpg_inner_loss(*given).loss) and torch.equal(states, reverse_gru_reset(**net))


def test_exported():
    assert {"lpg_inner_loss", "reverse_gru_reset"} <= set(prefkern.__all__) & set(reference.__all__)
