"""DPO and GRPO on image tokens, and guided log-probs: worked numbers, explicit logits, one product with the head, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from linear_losses import Passes
from prefkern.papers import image_cot_rl as study

F64 = torch.float64
B, L, H, V = 4, 5, 7, 11


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual: torch.Tensor, expected, atol: float = 1e-12) -> None:
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def random_head(rows=B, dtype=F64, **options):
    """h_c, h_u [rows, L, H], weight [V, H], bias [V], ids [rows, L]."""
    options = {"dtype": dtype, **options}
    h_c, h_u = (torch.randn(rows, L, H, **options) for _ in range(2))
    return h_c, h_u, torch.randn(V, H, **options), torch.randn(V, **options), torch.randint(V, (rows, L))


def explicit(h_c, h_u, weight, bias, ids, w, temperature=1.0):
    c, u = (h @ weight.mT + bias for h in (h_c, h_u))
    return torch.log_softmax((u + w * (c - u)) / temperature, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def near(*arguments) -> torch.Tensor:
    """Log-probs of a reference not far away."""
    lp = explicit(*arguments).detach()
    return lp + 0.3 * torch.randn_like(lp)


# ---- guidance


def test_worked_guided_log_probs() -> None:
    """Logits [1, 0, -1] and [.5, .5, 0] as hidden states of a head that copies them."""
    c, u, ids = tensor([[1, 0, -1]]), tensor([[0.5, 0.5, 0]]), torch.tensor([0])
    head = torch.eye(3, dtype=F64)
    close(study.cfg_hidden(c, u, 5.0), [[3, -2, -5]])
    close(study.cfg_token_logps(c, u, head, None, ids, cfg_weight=5.0), [-0.0070485104111], 1e-13)
    close(study.cfg_token_logps(c, u, head, None, ids, cfg_weight=1.0), [-0.4076059644444], 1e-13)


@pytest.mark.parametrize(("w", "temperature"), [(5.0, 1.0), (-1.5, 0.7), (0.3, 2.0)])
def test_gradients_reach_both_streams(w, temperature) -> None:
    h_c, h_u, weight, bias, ids = random_head()
    leaves = [t.requires_grad_() for t in (h_c, h_u, weight, bias)]
    ours = study.cfg_token_logps(*leaves, ids, cfg_weight=w, temperature=temperature)
    theirs = explicit(*leaves, ids, w, temperature)
    close(ours, theirs.detach())
    upstream = torch.randn(B, L, dtype=F64)
    found, expected = (torch.autograd.grad(lp, leaves, upstream) for lp in (ours, theirs))
    for a, e in zip(found, expected, strict=True):
        assert e.norm() > 1
        close(a, e)
    close(found[0] * (1 - w), found[1] * w)


def test_without_guidance_it_is_one_of_the_streams_to_the_bit() -> None:
    h_c, h_u, weight, bias, ids = random_head(dtype=torch.float32)
    assert torch.equal(study.cfg_hidden(h_c, h_u, 1.0), h_c) and torch.equal(study.cfg_hidden(h_c, h_u, 0.0), h_u)
    ids[0, 0] = -100
    assert study.cfg_token_logps(h_c, h_u, weight, bias, ids, cfg_weight=5.0)[0, 0] == 0


def test_in_bfloat16_it_loses_less_than_guided_logits_do() -> None:
    h_c, h_u, weight, bias, ids = random_head(rows=64, dtype=torch.bfloat16)
    exact = explicit(*(t.double() for t in (h_c, h_u, weight, bias)), ids, 5.0)
    ours = study.cfg_token_logps(h_c, h_u, weight, bias, ids, cfg_weight=5.0)
    plain = explicit(h_c, h_u, weight, bias, ids, 5.0)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 0.7 * (plain - exact).norm()


class Ops(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_head_is_gone_through_once(allocations, device) -> None:
    h_c, h_u, weight, bias, ids = (t.to(device) for t in random_head(rows=64, dtype=torch.float32))
    with Ops() as ops:
        study.cfg_token_logps(h_c, h_u, weight, bias, ids, cfg_weight=5.0)
    assert [name for name in ops.names if "mm" in name or "matmul" in name or "linear" in name] == [
        "prefkern::linear_logprobs_fwd"
    ]
    assert sum("lerp" in name for name in ops.names) == 1
    leaves = [t.requires_grad_() for t in (h_c, h_u, weight)]
    with Ops() as ops:
        torch.autograd.grad(study.cfg_token_logps(*leaves, bias, ids, cfg_weight=5.0).sum(), leaves)
    heads = [name for name in ops.names if name.startswith("prefkern::")]
    assert heads == ["prefkern::linear_logprobs_fwd", "prefkern::linear_logprobs_backward"]
    vocabulary = 8192
    weight = torch.randn(vocabulary, H, device=device)
    with torch.no_grad():
        used = allocations(lambda: study.cfg_token_logps(h_c, h_u, weight, None, ids, cfg_weight=5.0, chunk_bytes=1 << 18))
    assert used.largest < 64 * L * vocabulary * 4 / 8  # of logits there is never more than a chunk


# ---- rewards, advantages, pairs


def test_worked_yes_rewards() -> None:
    yes, no = tensor([0.6, 0.1, 0.6, 0.0]), tensor([0.2, 0.3, 0.2, 0.0])
    answered = torch.tensor([True, True, False, True])
    close(study.yes_reward(yes, no, answered), [0.75, 0.25, 0, 0])
    close(study.yes_reward(yes, no), [0.75, 0.25, 0.75, 0])
    dropped = study.yes_reward(yes, no, answered, invalid="nan_drop")
    close(dropped[:2], [0.75, 0.25])
    assert dropped[2:].isnan().all()
    assert study.yes_reward(yes.half(), no.half()).dtype == torch.float32


def test_worked_advantages() -> None:
    rewards = tensor([[0.3, 0.9], [0.2, 0.4], [0.25, 0.8], [0.35, 0.1]])
    expected = [1.0499160277203, -0.6299496166322, 0.6299496166322, -1.0499160277203]
    close(study.image_grpo_advantages(rewards, group=4), expected, 1e-13)
    close(study.image_grpo_advantages(rewards.sum(1), group=4), expected, 1e-13)
    twice = torch.stack([rewards, rewards.flip(0)], 1).flatten(0, 1)  # two prompts in turn, by ids
    close(study.image_grpo_advantages(twice, group=torch.tensor([7, 3] * 4))[::2], expected, 1e-13)
    close(study.image_grpo_advantages(tensor([0.7] * 4 + [0.0, 1, 0, 1]), group=4)[:4], [0] * 4, 0)


def test_dropped_images_leave_their_group() -> None:
    rewards = tensor([[1, 0], [3, 0], [5, math.nan], [2, 0], [1, 1], [math.nan, 1], [0, math.nan]])
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    found = study.image_grpo_advantages(rewards, group=ids, nan="drop")
    close(found[[0, 1, 3]], study.image_grpo_advantages(tensor([1, 3, 2]), group=3))
    close(found[[2, 4, 5, 6]], [0] * 4, 0)
    pairs = study.pick_pairs(rewards, ids, nan="drop")
    assert (pairs.chosen[0], pairs.rejected[0]) == (1, 0) and pairs.keep.tolist() == [True, False]


def test_worked_pairs() -> None:
    rewards = tensor([0.1, 0.7, 0.7, 0.3, 0.5, 0.5, 0.5, 0.5])
    pairs = study.pick_pairs(rewards, 4)
    assert (pairs.chosen[0], pairs.rejected[0]) == (1, 0)
    assert pairs.keep.tolist() == [True, False]
    assert study.pick_pairs(rewards, 4, min_gap=0.59).keep.tolist() == [True, False]
    assert study.pick_pairs(rewards, 4, min_gap=0.7).keep.tolist() == [False, False]


@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=1, max_size=12), st.integers(0, 2))
def test_pairs_by_ids_are_those_of_a_loop(rows, min_gap) -> None:
    ids, scores = (list(column) for column in zip(*rows, strict=True))
    found = study.pick_pairs(tensor(scores), torch.tensor(ids), min_gap=min_gap)
    for m, group in enumerate(sorted(set(ids))):
        own = [i for i, g in enumerate(ids) if g == group]
        best, worst = max(own, key=lambda i: (scores[i], -i)), min(own, key=lambda i: (scores[i], i))
        assert (found.chosen[m], found.rejected[m]) == (best, worst)
        assert found.keep[m] == (scores[best] - scores[worst] > min_gap)
    assert len(found.keep) == len(set(ids))


# ---- DPO


def test_worked_dpo() -> None:
    lp_w, lp_l = tensor([[-2, -3, -1]]).requires_grad_(), tensor([[-2.5, -2, -4]]).requires_grad_()
    ref_w, ref_l = tensor([[-2.2, -2.9, -1.5]]), tensor([[-2.4, -2.2, -3]])
    masks = torch.tensor([[True, True, True]]), torch.tensor([[True, True, False]])
    out = study.image_dpo_loss(lp_w, lp_l, ref_w, ref_l, *masks)
    close(out.metrics["reward_margin"], 0.05)
    close(out.loss, 0.6684596480133, 1e-13)
    grad_w, grad_l = torch.autograd.grad(out.loss, (lp_w, lp_l))
    close(grad_w, [[-0.0487502603516] * 3], 1e-13)
    close(grad_l, [[0.0487502603516, 0.0487502603516, 0]], 1e-13)


def test_sides_of_other_lengths_and_margins_of_tens() -> None:
    lp_w, lp_l = torch.full((2, 576), -9.0), torch.full((2, 256), -12.0)
    out = study.image_dpo_loss(lp_w.requires_grad_(), lp_l.requires_grad_(), lp_w.detach() - 1, lp_l.detach() + 1)
    assert_close(out.metrics["reward_margin"], torch.tensor(57.6 + 25.6))
    assert 0 < out.loss < 1e-30  # log(1 + exp(-83)), which log(sigmoid) rounds to 0
    out = study.image_dpo_loss(lp_w, lp_l, lp_w.detach() + 1, lp_l.detach() - 1)
    assert_close(out.loss.detach(), torch.tensor(83.2))
    assert_close(torch.autograd.grad(out.loss, lp_w)[0], torch.full((2, 576), -0.05))
    assert study.image_dpo_loss(*[torch.zeros(0, 3)] * 4).loss == 0  # every group was dropped


@pytest.mark.parametrize("logprob", study.LOGPROBS)
def test_dpo_from_hidden_states(logprob, monkeypatch) -> None:
    h_c, h_u, weight, bias, ids = random_head()
    leaves = [t.requires_grad_() for t in (h_c, h_u, weight, bias)]
    guided = {"h_uncond": h_u, "cfg_weight": 3.0} if logprob == "guided" else {}
    ref, mask = near(*leaves, ids, 3.0 if guided else 1.0, 0.8), torch.rand(B, L) < 0.7
    mask[:, 0] = True
    passes = Passes(monkeypatch)
    out = study.linear_image_dpo_loss(h_c, weight, bias, ids, ref, mask, beta=0.3, logprob=logprob, temperature=0.8, **guided)
    trained = leaves if guided else [h_c, weight, bias]
    found = torch.autograd.grad(out.loss, trained)
    assert passes.logits == passes.hidden == passes.weight == mask.sum()
    lp = explicit(*leaves, ids, 3.0 if guided else 1.0, 0.8)
    (lp_w, lp_l), (ref_w, ref_l), masks = lp.chunk(2), ref.chunk(2), mask.chunk(2)
    expected = study.image_dpo_loss(lp_w, lp_l, ref_w, ref_l, *masks, beta=0.3)
    close(out.loss, expected.loss.detach())
    close(out.metrics["reward_margin"], expected.metrics["reward_margin"])
    for a, e in zip(found, torch.autograd.grad(expected.loss, trained), strict=True):
        assert e.norm() > 1e-3
        close(a, e)


# ---- GRPO

LP, REF = tensor([[-1, -2], [-1.5, -0.5]]), tensor([[-1.1, -1.8], [-1.5, -0.7]])
MASK = torch.tensor([[True, True], [True, False]])


def test_worked_grpo() -> None:
    lp = LP.clone().requires_grad_()
    out = study.image_policy_loss(lp, REF, tensor([1.2, -0.4]), MASK)
    close(out.loss, -0.6665791994127, 1e-13)
    close(out.metrics["kl"], 0.0087467253987, 1e-13)
    expected = [[-0.3996827913935, -0.4007380091939], [0.1333333333333, 0]]
    close(torch.autograd.grad(out.loss, lp)[0], expected, 1e-13)
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1


def test_what_the_mean_is_over() -> None:
    def loss(normalizer):
        return study.image_policy_loss(LP, REF, tensor([1.2, -0.4]), MASK, normalizer=normalizer, beta_kl=0.0).loss

    close(loss("token"), (-1.2 * 2 + 0.4) / 3)
    close(loss("sequence"), (-1.2 + 0.4) / 2, 1e-7)
    close(loss(5), (-1.2 * 2 + 0.4) / 5)
    close(loss(tensor(5.0)), (-1.2 * 2 + 0.4) / 5)


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0, 1), st.integers(0, 2**16))
def test_grpo_is_minus_the_mean_advantage_and_the_kl(rewards, beta_kl, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    lp, ref = (-3 * torch.rand(4, 3, dtype=F64, generator=generator) for _ in range(2))
    mask = torch.rand(4, 3, generator=generator) < 0.6
    mask[0, 0] = True
    out = study.image_grpo_loss(lp, ref, tensor(rewards), mask, group=2, beta_kl=beta_kl)
    advantages = study.image_grpo_advantages(tensor(rewards), group=2)
    close(advantages.view(2, 2).sum(1), [0, 0], 1e-9)
    mean = (advantages[:, None] * mask).sum() / mask.sum()
    close(out.loss, -mean + beta_kl * out.metrics["kl"])


def test_a_group_of_equals_leaves_the_kl() -> None:
    lp = LP.clone().requires_grad_()
    out = study.image_grpo_loss(lp, REF, tensor([0.5, 0.5]), MASK, group=2, beta_kl=0.3)
    (grad,) = torch.autograd.grad(out.loss, lp)
    close(grad, MASK.double() / 3 * 0.3 * (1 - (REF - LP).exp()), 1e-13)


def test_dropped_images_have_no_tokens_in_the_loss() -> None:
    lp, ref = (-torch.rand(4, 3, dtype=F64) for _ in range(2))
    rewards = tensor([[1, 0], [0, 0], [2, math.nan], [3, 1]])
    for mask in (None, torch.tensor([[True, True, False]] * 4)):
        out = study.image_grpo_loss(lp.requires_grad_(), ref, rewards, mask, group=4, nan="drop")
        kept = [0, 1, 3]
        three = None if mask is None else mask[kept]
        other = study.image_grpo_loss(lp[kept], ref[kept], rewards[kept], three, group=3)
        close(out.loss, other.loss.detach())
        assert (torch.autograd.grad(out.loss, lp)[0][2] == 0).all()


@pytest.mark.parametrize("logprob", study.LOGPROBS)
@pytest.mark.parametrize("normalizer", ["token", "sequence", 9.0])
def test_grpo_from_hidden_states(logprob, normalizer, monkeypatch) -> None:
    h_c, h_u, weight, bias, ids = random_head()
    leaves = [t.requires_grad_() for t in (h_c, h_u, weight, bias)]
    guided = {"h_uncond": h_u, "cfg_weight": 3.0} if logprob == "guided" else {}
    ref, rewards = near(*leaves, ids, 3.0 if guided else 1.0), torch.rand(B, 2, dtype=F64)
    ids[2, 3:] = -100
    mask = torch.rand(B, L) < 0.7
    passes = Passes(monkeypatch)
    out = study.linear_image_grpo_loss(
        h_c, weight, bias, ids, ref, rewards, mask, group=2, beta_kl=0.2, normalizer=normalizer, logprob=logprob, **guided
    )
    trained = leaves if guided else [h_c, weight, bias]
    found = torch.autograd.grad(out.loss, trained)
    counts = mask & (ids != -100)
    assert passes.logits == passes.hidden == passes.weight == counts.sum()
    lp = explicit(*leaves, ids.clamp_min(0), 3.0 if guided else 1.0)
    expected = study.image_grpo_loss(lp, ref, rewards, counts, group=2, beta_kl=0.2, normalizer=normalizer)
    close(out.loss, expected.loss.detach())
    for a, e in zip(found, torch.autograd.grad(expected.loss, trained), strict=True):
        assert e.norm() > 1e-3
        close(a, e)


def test_a_constant_on_all_logits_changes_nothing() -> None:
    h_c, h_u, weight, bias, ids = random_head()
    first = study.cfg_token_logps(h_c, h_u, weight, bias, ids, cfg_weight=5.0)
    close(study.cfg_token_logps(h_c, h_u, weight, bias + 100, ids, cfg_weight=5.0), first)


def test_it_compiles_without_a_break() -> None:
    h_c, h_u, weight, bias, ids = random_head()
    rewards = torch.rand(B, dtype=F64)

    def step(h_c, h_u):
        lp = study.cfg_token_logps(h_c, h_u, weight, bias, ids, cfg_weight=5.0)
        out = study.image_grpo_loss(lp, lp.detach() - 0.1, rewards, None, group=2)
        half = lp.chunk(2)
        return out.loss + study.image_dpo_loss(*half, *(t.detach() - 0.1 for t in half)).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = compiled(h_c, h_u), step(h_c, h_u)
    close(found, expected)
    empty = torch.zeros(B, L, dtype=torch.bool)  # while compiling, values cannot be looked at
    loss = torch.compile(
        lambda m: study.image_grpo_loss(h_c[..., 0], h_u[..., 0], rewards, m, group=2).loss, backend="aot_eager"
    )
    assert loss(empty).isnan() and loss(~empty).isfinite()


# ---- refusals

ONE = torch.zeros(4, 3, dtype=F64)
HEAD = (torch.zeros(4, 3, 2), torch.zeros(5, 2), None, torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))
REWARDS = tensor([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: study.cfg_hidden(ONE, ONE[:2], 1.0), ValueError, r"h_u has shape \[2, 3\]; \[4, 3\] is expected, as h_c"),
        (lambda: study.cfg_hidden(ONE, ONE.float(), 1.0), TypeError, "h_u has dtype torch.float32 and h_c has torch.float64"),
        (lambda: study.cfg_hidden(ONE.long(), ONE.long(), 1.0), TypeError, "h_c has dtype torch.int64; a floating dtype"),
        (lambda: study.cfg_hidden(ONE, ONE, math.inf), ValueError, "w is inf; a finite number is expected"),
        (lambda: study.cfg_hidden(ONE, None, 1.0), TypeError, "h_u is a NoneType; a torch.Tensor is expected"),
        (
            lambda: study.cfg_token_logps(ONE, ONE[:2], *HEAD[1:4], cfg_weight=2.0),
            ValueError,
            r"h_uncond has shape \[2, 3\]; \[4, 3\] is expected, as h_cond",
        ),
        (lambda: study.cfg_token_logps(ONE, ONE, *HEAD[1:4], cfg_weight="5"), TypeError, "cfg_weight is '5'; a number"),
        (lambda: study.yes_reward(tensor([0.5, 1.5]), tensor([0.1, 0.1])), ValueError, r"p_yes\[1\] is 1.5; a probability"),
        (lambda: study.yes_reward(tensor([0.5]), tensor([math.nan])), ValueError, r"p_no\[0\] is nan; a probability"),
        (lambda: study.yes_reward(tensor([0.5]), tensor([0.1, 0.2])), ValueError, r"p_no has shape \[2\]; \[1\]"),
        (lambda: study.yes_reward(tensor([0.5]), tensor([0.1]), torch.ones(1)), TypeError, "answered has dtype torch.float32"),
        (
            lambda: study.yes_reward(tensor([0.5]), tensor([0.1]), invalid="drop"),
            ValueError,
            "invalid is 'drop'; accepted: 'zero', 'nan_drop'",
        ),
        (lambda: study.image_grpo_advantages(REWARDS, group=1), ValueError, "group is 1; at least two images"),
        (
            lambda: study.image_grpo_advantages(REWARDS, group=3),
            ValueError,
            "group is 3, of which the 4 rows of rewards are no",
        ),
        (
            lambda: study.image_grpo_advantages(REWARDS, group=torch.tensor([5, 5, 8, 5])),
            ValueError,
            r"group\[2\] is 8; it is the only image of its group",
        ),
        (lambda: study.image_grpo_advantages(REWARDS, group="4"), TypeError, "group is '4'; an integer"),
        (lambda: study.image_grpo_advantages(REWARDS[:, None, None], group=4), ValueError, r"rewards has shape \[4, 1, 1\]"),
        (
            lambda: study.image_grpo_advantages(tensor([[0, 1], [2, math.nan]]), group=2),
            ValueError,
            r"rewards\[1, 1\] is nan; every reward must be finite",
        ),
        (lambda: study.image_grpo_advantages(tensor([0, math.inf]), group=2, nan="drop"), ValueError, r"rewards\[1\] is inf"),
        (lambda: study.image_grpo_advantages(REWARDS, group=4, nan="zero"), ValueError, "nan is 'zero'; accepted: 'error'"),
        (lambda: study.pick_pairs(tensor([0, 1, math.nan, 2]), 2), ValueError, r"rewards\[2\] is nan; finite numbers"),
        (
            lambda: study.pick_pairs(tensor([[0, 1], [1, -math.inf]]), 2, nan="drop"),
            ValueError,
            r"rewards\[1\] is \[1.0, -inf\]",
        ),
        (lambda: study.pick_pairs(REWARDS, 4, min_gap=-1), ValueError, "min_gap is -1.0; it must be finite and not negative"),
        (lambda: study.pick_pairs(REWARDS, 4, min_gap=math.nan), ValueError, "min_gap is nan"),
        (lambda: study.image_dpo_loss(ONE, ONE[:2], ONE, ONE[:2]), ValueError, "lp_l has 2 rows; 4 are expected, as lp_w has"),
        (
            lambda: study.image_dpo_loss(ONE, ONE, ONE[:, :2], ONE),
            ValueError,
            r"ref_w has shape \[4, 2\]; \[4, 3\] is expected",
        ),
        (lambda: study.image_dpo_loss(ONE[0], ONE, ONE, ONE), ValueError, r"lp_w has shape \[3\]; \[B, L\] is expected"),
        (lambda: study.image_dpo_loss(ONE, ONE, ONE, ONE, None, ONE), TypeError, "mask_l has dtype torch.float64; bool"),
        (
            lambda: study.image_dpo_loss(ONE, ONE, ONE, ONE, ONE == 0, torch.arange(4)[:, None].expand(4, 3) != 2),
            ValueError,
            r"mask_l\[2\] counts no token; each image must have one at least",
        ),
        (lambda: study.image_policy_loss(ONE, ONE, REWARDS[:2]), ValueError, r"advantages has shape \[2\]; \[4\] is expected"),
        (lambda: study.image_policy_loss(ONE, ONE, REWARDS, normalizer="tokens"), ValueError, "accepted: 'token', 'sequence'"),
        (lambda: study.image_policy_loss(ONE, ONE, REWARDS, normalizer=0), ValueError, "normalizer is 0.0; a number of tokens"),
        (lambda: study.image_policy_loss(ONE, ONE, REWARDS, normalizer=None), TypeError, "normalizer is None; 'token', "),
        (lambda: study.image_grpo_loss(ONE, ONE, REWARDS, ONE != 0, group=2), ValueError, "mask counts no token; at least one"),
        (
            lambda: study.image_grpo_loss(ONE, ONE, REWARDS[:2], group=2),
            ValueError,
            "rewards has 2 rows; 4 are expected, as lp",
        ),
        (
            lambda: study.linear_image_grpo_loss(*HEAD[:3], HEAD[3] - 100, HEAD[4], REWARDS, group=2),
            ValueError,
            "ids counts no token",
        ),
        (
            lambda: study.linear_image_dpo_loss(*HEAD, logprob="guided", h_uncond=HEAD[0]),
            ValueError,
            "cfg_weight is None, but logprob is 'guided'",
        ),
        (
            lambda: study.linear_image_dpo_loss(*HEAD, cfg_weight=5.0),
            ValueError,
            "cfg_weight is given, but logprob is 'conditional'",
        ),
        (lambda: study.linear_image_dpo_loss(*HEAD, logprob="cfg"), ValueError, "logprob is 'cfg'; accepted: 'conditional'"),
        (
            lambda: study.linear_image_dpo_loss(*HEAD, torch.arange(4)[:, None].expand(4, 3) != 3),
            ValueError,
            r"mask\[3\] counts no token",
        ),
    ],
)
def test_refusals(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
