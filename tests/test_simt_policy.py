"""The CUDA kernels of csrc/policy, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import INF, NAN, close, launches, pointer, same_bits, same_bits_in_every_order, tensor_like

KINDS = ("clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none")
AGGREGATIONS = (
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum", "trl-grpo",
    "trl-dr_grpo",
)  # fmt: skip
METRICS = (
    "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "ratio_mean", "ratio_min", "ratio_max",
    "approx_kl", "kl", "entropy", "tokens", "sequences",
)  # fmt: skip
BOUNDS = ("dual_clip", "delta", "kl_clamp")


def policy_loss(
    simt, logp, old_logp, advantages, mask=None, *, slices=None, with_grad=True, upstream=1.0, into=None, **options
):
    """Loss, metrics and the gradient by name; `into` is for the forward's part of it, per token.

    The options are those of prefkern.policy_loss.
    """
    args = simt.PolicyArgs()
    lengths, ref_logp = options.pop("cu_seqlens", None), options.pop("ref_logp", None)
    args.layout.tokens = logp.numel()
    args.layout.sequences = logp.shape[0] if lengths is None else len(lengths) - 1
    args.layout.padded_length = logp.shape[1] if lengths is None else 0
    args.layout.cu_seqlens = pointer(lengths)
    args.options.kind = getattr(simt.PolicyKind, options.get("kind", "clip"))
    args.options.agg = getattr(simt.Aggregation, options.get("agg", "token-mean").replace("-", "_"))
    kl = options.get("kl", "k3").replace("+", "_plus")
    args.options.kl = simt.KlKind.none if ref_logp is None else getattr(simt.KlKind, kl)
    clamp = options.get("ratio_clamp", 20.0)
    args.options.clamp_low, args.options.clamp_high = (-INF, INF) if clamp is None else (-clamp, clamp)
    args.options.anchor_nll = options.get("anchor_loss") == "nll"
    for name in ("eps_low", "eps_high", "beta", "kl_ratio", "scale", "norm", "anchor_gamma", *BOUNDS):
        value = options.get(name)
        if value is not None and not isinstance(value, Tensor):
            setattr(args.options, name, value)
    args.logp, args.old_logp, args.ref_logp, args.mask = map(pointer, (logp, old_logp, ref_logp, mask))
    each = {
        "advantages": advantages, "weights": options.get("token_weight"), "eps_low": options.get("eps_low"),
        "eps_high": options.get("eps_high"),
    }  # fmt: skip
    for name, values in each.items():
        if isinstance(values, Tensor):
            setattr(args, name, pointer(values))
            setattr(args, f"token_{name}", values.shape == logp.shape)
    args.entropy, args.anchor = pointer(options.get("entropy")), pointer(options.get("anchor"))
    args.norm = pointer(options["norm"]) if isinstance(options.get("norm"), Tensor) else 0
    args.slices = slices or simt.policy_slices(args.layout)

    unnormalised = tensor_like(logp) if into is None else into
    grad_logp = tensor_like(logp)
    scalars = {name: torch.full((), NAN) for name in ("loss", "inverse_norm")}
    metrics = torch.full((simt.POLICY_METRICS,), NAN)
    partials = torch.full((args.layout.sequences * args.slices, simt.POLICY_SUMS), NAN)
    row_partials = torch.full((args.layout.sequences * args.slices, simt.POLICY_ROW_SUMS), NAN)
    finished = torch.zeros(1, dtype=torch.int32)
    args.grad = pointer(unnormalised) if with_grad else 0
    args.loss, args.inverse_norm = pointer(scalars["loss"]), pointer(scalars["inverse_norm"])
    args.metrics, args.partials, args.finished = map(pointer, (metrics, partials, finished))
    args.row_partials = pointer(row_partials)
    simt.cuda_policy_loss(args)
    result = {"loss": scalars["loss"], "metrics": metrics}
    if with_grad:
        grad_of_loss = torch.tensor(upstream)
        backward = simt.PolicyGradArgs()
        backward.tokens = logp.numel()
        backward.unnormalised, backward.upstream = pointer(unnormalised), pointer(grad_of_loss)
        backward.inverse_norm, backward.grad = pointer(scalars["inverse_norm"]), pointer(grad_logp)
        simt.cuda_policy_loss_backward(backward)
        result["grad"] = grad_logp
    return result


def check_policy_loss(simt, logp, old_logp, advantages, mask=None, **options):
    def compute():
        return policy_loss(simt, logp, old_logp, advantages, mask, upstream=3.0, **options)

    out = same_bits_in_every_order(simt, compute)
    options.pop("slices", None)
    leaf = logp.double().requires_grad_()
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}
    expected = reference.policy_loss(leaf, old_logp.double(), advantages.double(), mask, **wide)
    (3.0 * expected.loss).backward()
    close(out["loss"], expected.loss.detach(), atol=1e-6, rtol=1e-5)  # terms of both signs nearly cancel
    close(out["metrics"], torch.stack([expected.metrics[name].double() for name in METRICS]), atol=1e-6, rtol=2e-6)
    close(out["grad"], leaf.grad, atol=1e-7 * max(1.0, leaf.grad.abs().max().item() if leaf.grad.numel() else 1.0), rtol=1e-5)
    return out


def sample_policy(shape: tuple[int, ...], *, offset: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, old_logp, ref_logp and a mask, `offset` elements into their memory, with garbage outside the mask."""
    size = torch.Size(shape).numel()
    old_logp, mask = -2 * torch.rand(size), torch.rand(size) < 0.7
    mask[: min(3 * shape[-1], size) : 2] = False
    logp, ref_logp = (old_logp + 0.4 * torch.randn(size) for _ in range(2))
    for tensor, garbage in ((logp, NAN), (old_logp, INF), (ref_logp, -INF)):
        tensor[~mask] = garbage
    return tuple(at_offset(tensor.view(shape), offset) for tensor in (logp, old_logp, ref_logp, mask))


def at_offset(values: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements into its memory."""
    return torch.cat([values.flatten()[:offset], values.flatten()])[offset:].view(values.shape)


def all_kept(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.nan_to_num(tensor, nan=-0.5, posinf=-0.4, neginf=-0.3) for tensor in tensors)


@pytest.mark.parametrize("moved", ["logp", "old_logp", "advantages", "mask", "ref_logp", "into"])
def test_policy_loss_of_one_tensor_at_an_odd_address(simt, moved):
    logp, old_logp, ref_logp, mask = sample_policy((3, 400))
    tensors = {
        "logp": logp, "old_logp": old_logp, "advantages": torch.randn(3, 400), "mask": mask, "ref_logp": ref_logp,
        "into": torch.empty(3, 400),
    }  # fmt: skip
    options = {"agg": "seq-mean-token-mean", "beta": 0.1}
    expected = policy_loss(simt, **tensors, **options)
    out = policy_loss(simt, **{**tensors, moved: at_offset(tensors[moved], 1)}, **options)
    for name, values in expected.items():
        close(out[name], values, atol=1e-7)


LENGTHS = (0, 1, 0, 300, 3, 4, 5, 64, 1027, 0)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("with_ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("per_token", [False, True], ids=["A of sequence", "A of token"])
@pytest.mark.parametrize("offset", [0, 1])
def test_policy_loss(simt, masked, packed, agg, with_ref, per_token, offset):
    shape = (sum(LENGTHS),) if packed else (5, 83)
    logp, old_logp, ref_logp, mask = sample_policy(shape, offset=offset)
    if not masked:
        logp, old_logp, ref_logp = all_kept(logp, old_logp, ref_logp)
    advantages = torch.randn(shape) if per_token else torch.randn(len(LENGTHS) if packed else 5)
    out = check_policy_loss(
        simt, logp, old_logp, advantages, mask if masked else None, agg=agg, dual_clip=1.5, eps_low=0.1, eps_high=0.3,
        cu_seqlens=torch.tensor((0, *LENGTHS)).cumsum(0).int() if packed else None,
        ref_logp=ref_logp if with_ref else None, beta=0.2 if with_ref else 0.0,
    )  # fmt: skip
    assert not masked or not out["grad"][~mask].any()


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_policy_loss_of_few_long_sequences(simt, agg, packed):
    """Several blocks share a sequence."""
    logp, old_logp, ref_logp, mask = sample_policy((2, 5003))
    options = {"agg": agg, "beta": 0.1}
    if packed:
        logp, old_logp, ref_logp, mask = (tensor.view(-1) for tensor in (logp, old_logp, ref_logp, mask))
        options["cu_seqlens"] = torch.tensor([0, 4001, 10006], dtype=torch.int32)
    layout = simt.SequenceLayout()
    layout.sequences, layout.tokens = 2, 10006
    assert simt.policy_slices(layout) == 3
    check_policy_loss(simt, logp, old_logp, torch.tensor([1.0, -0.5]), mask, ref_logp=ref_logp, **options)
    check_policy_loss(simt, logp, old_logp, torch.tensor([1.0, -0.5]), mask, ref_logp=ref_logp, slices=7, **options)


@pytest.mark.parametrize("ratio_clamp", [2.0, None])
@pytest.mark.parametrize("dual_clip", [3.0, None])
def test_policy_loss_of_ratios_far_from_one(simt, ratio_clamp, dual_clip):
    old_logp = torch.zeros(2, 100)
    logp = torch.linspace(-9, 9, 200).view(2, 100)
    logp[0, 3], logp[0, 4] = 0.0, 1e-4
    for sign in (1.0, -1.0, 0.0):
        check_policy_loss(
            simt, logp, old_logp, torch.full((2,), sign), ratio_clamp=ratio_clamp, dual_clip=dual_clip, agg="token-mean"
        )


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss_of_an_empty_mask_is_zero(simt, agg):
    nothing = torch.full((3, 50), NAN)
    out = policy_loss(simt, nothing, nothing, torch.full((3,), NAN), torch.zeros(3, 50, dtype=torch.bool), agg=agg)
    assert not any(tensor.any() for tensor in out.values())
    out = policy_loss(simt, torch.empty(3, 0), torch.empty(3, 0), torch.ones(3), agg=agg)
    assert not any(tensor.any() for tensor in out.values())


def test_policy_loss_without_gradient(simt):
    logp, old_logp, _, mask = sample_policy((4, 60))
    arguments = (simt, logp, old_logp, torch.randn(4), mask)
    with_grad, without = policy_loss(*arguments), policy_loss(*arguments, with_grad=False)
    assert all(same_bits(without[name], with_grad[name]) for name in without)


@pytest.mark.parametrize("token", [0, 77])
def test_policy_loss_of_nan(simt, token):
    logp, old_logp = torch.randn(4, 30), torch.randn(4, 30)
    logp.view(-1)[token] = NAN
    out = policy_loss(simt, logp, old_logp, torch.ones(4))
    assert out["loss"].isnan()
    assert [name for name, value in zip(METRICS, out["metrics"], strict=True) if value.isnan()] == [
        "ratio_mean", "ratio_min", "ratio_max", "approx_kl",
    ]  # fmt: skip
    assert torch.equal(out["grad"].isnan(), logp.isnan())


@pytest.mark.parametrize(
    "lengths", [(0, 20, 10, 40), (1, 20, 40), (0, 20, 39), (0, 20, 41), (0, -5, 40), (0, 2**30, 40), (-1, 20, 40)]
)
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss_of_a_wrong_layout_is_nan(simt, lengths, agg):
    logp, old_logp, mask = torch.randn(40), torch.randn(40), torch.rand(40) < 0.5
    advantages = torch.ones(len(lengths) - 1)
    for m in (None, mask):
        out = policy_loss(simt, logp, old_logp, advantages, m, cu_seqlens=torch.tensor(lengths, dtype=torch.int32), agg=agg)
        assert all(tensor.isnan().all() for tensor in out.values())


def test_policy_loss_backward_leaves_zeros_alone(simt):
    logp, old_logp, _, mask = sample_policy((3, 70))
    out = policy_loss(simt, logp, old_logp, torch.ones(3), mask, upstream=INF)
    assert not out["grad"][~mask].any()
    assert out["grad"].isinf().any()


def test_backward_of_more_tokens_than_the_grid_has_threads(simt):
    tokens = 4096 * 256 * 4 + 5
    unnormalised, grad_logp = torch.randn(tokens), torch.full((tokens,), NAN)
    upstream, inverse_norm = torch.tensor(0.5), torch.tensor(0.25)
    args = simt.PolicyGradArgs()
    args.tokens = tokens
    args.unnormalised, args.grad = pointer(unnormalised), pointer(grad_logp)
    args.upstream, args.inverse_norm = pointer(upstream), pointer(inverse_norm)
    simt.cuda_policy_loss_backward(args)
    assert torch.equal(grad_logp, unnormalised * 0.125)


@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_forward_and_one_back(simt, kind):
    """With metrics and gradient. The kinds with a ratio per sequence need that first: one more."""
    logp, old_logp, ref_logp, mask = sample_policy((3, 50))
    options = {"kind": kind, "ref_logp": ref_logp, "beta": 0.1}

    def forward():
        policy_loss(simt, logp, old_logp, torch.randn(3), mask, with_grad=False, **options)

    def forward_and_back():
        policy_loss(simt, logp, old_logp, torch.randn(3), mask, **options)

    first = 2 if kind in ("gspo", "gspo_token", "gmpo") else 1
    assert launches(simt, forward) == first
    assert launches(simt, forward_and_back) == first + 1


def test_no_rows_launch_nothing(simt):
    simt.cuda_policy_loss(simt.PolicyArgs())
    simt.cuda_policy_loss_backward(simt.PolicyGradArgs())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("slices", [None, 3])
def test_every_kind_with_every_option(simt, kind, packed, slices):
    shape, rows = ((sum(LENGTHS),), len(LENGTHS)) if packed else ((5, 83), 5)
    logp, old_logp, ref_logp, mask = sample_policy(shape)
    garbage = ~mask
    for variant, agg in enumerate(AGGREGATIONS):
        each = variant % 2 == 0 and kind not in ("gspo", "gmpo")  # one value per token
        options = {
            "kind": kind, "agg": agg, "ref_logp": ref_logp, "beta": 0.2, "slices": slices,
            "kl": ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")[variant], "kl_clamp": 0.15 if variant > 3 else None,
            "kl_ratio": variant in (1, 2, 4) and kind != "gmpo", "norm": torch.tensor(7.0) if variant == 3 else None,
            "scale": 11.0 if "norm" in agg or "dr" in agg else None, "eps_low": torch.rand(shape if each else rows) / 2,
            "eps_high": 0.1 if variant == 5 else torch.rand(rows) / 2, "token_weight": torch.rand(shape if each else rows),
            "ratio_clamp": 0.3 if variant == 4 else 20.0,
        }  # fmt: skip
        if kind in ("clip", "gspo", "gspo_token"):
            options |= {"delta": 1.1, "dual_clip": 1.3}
        if kind != "none" and variant != 6:
            options |= {"anchor": torch.rand(rows) < 0.4, "anchor_loss": ("shaped", "nll")[variant % 2], "anchor_gamma": 0.2}
        if packed:
            options["cu_seqlens"] = torch.tensor((0, *LENGTHS)).cumsum(0).int()
        entropy = torch.rand(shape)
        entropy[garbage] = NAN
        options["entropy"] = entropy
        for name in ("token_weight", "eps_low"):
            if options[name].shape == shape:
                options[name][garbage] = NAN
        advantages = torch.randn(shape if each else rows)
        check_policy_loss(simt, logp, old_logp, advantages, mask, **options)


@pytest.mark.parametrize("kind", ["gspo", "gspo_token", "gmpo"])
def test_a_ratio_of_a_sequence_that_several_blocks_share(simt, kind):
    logp, old_logp, ref_logp, mask = sample_policy((2, 5003))
    check_policy_loss(
        simt, logp, old_logp, torch.tensor([1.0, -0.5]), mask, kind=kind, ref_logp=ref_logp, beta=0.1, eps_low=0.01,
        eps_high=0.01, agg="trl-grpo",
    )  # fmt: skip


def test_a_sequence_whose_slices_are_mostly_empty_counts(simt):
    logp, old_logp, mask = torch.randn(3, 90), torch.randn(3, 90), torch.zeros(3, 90, dtype=torch.bool)
    mask[0, 80], mask[2, :2] = True, True
    for agg in AGGREGATIONS[:6]:
        options = {"scale": 2.0} if "norm" in agg else {}
        out = check_policy_loss(simt, logp, old_logp, torch.ones(3), mask, agg=agg, slices=5, **options)
        assert out["metrics"][METRICS.index("sequences")] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bounds_make_their_tokens_nan(simt, kind):
    logp, old_logp = torch.randn(3, 40), torch.randn(3, 40)
    bad = torch.tensor([0.1, -0.1, 0.2])
    out = policy_loss(simt, logp, old_logp, torch.ones(3), kind=kind, eps_low=bad, ref_logp=old_logp)
    assert out["loss"].isnan()
    assert torch.equal(out["grad"].isnan().any(1), torch.tensor([False, True, False]))
    if kind in ("gspo", "none"):
        return
    each = torch.full((3, 40), 0.1)
    each[1, 7] = INF
    out = policy_loss(simt, logp, old_logp, torch.ones(3), kind=kind, eps_high=each)
    assert out["loss"].isnan()
    assert out["grad"][1, 7].isnan()
    assert out["grad"][[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_a_wrong_norm_makes_everything_nan(simt, value):
    out = policy_loss(simt, torch.randn(3, 40), torch.randn(3, 40), torch.ones(3), norm=torch.tensor(value))
    assert out["loss"].isnan()
    assert out["grad"].isnan().all()


WRONG_LAYOUTS = [(0, 20, 10, 40), (1, 20, 40), (0, 20, 39), (0, 20, 41), (0, -5, 40), (0, 2**30, 40), (-1, 20, 40)]


@pytest.mark.parametrize("lengths", WRONG_LAYOUTS)
@pytest.mark.parametrize("kind", ["gspo", "gmpo", "none"])
def test_every_kernel_finds_a_wrong_layout(simt, lengths, kind):
    logp, old_logp = torch.randn(40), torch.randn(40)
    options = {"cu_seqlens": torch.tensor(lengths, dtype=torch.int32), "kind": kind, "ref_logp": old_logp, "agg": "trl-grpo"}
    out = policy_loss(simt, logp, old_logp, torch.ones(len(lengths) - 1), **options)
    assert all(tensor.isnan().all() for tensor in out.values())


# -------------------------------------------------------------------------------------------------- importance weights


def importance_weights(simt, old_logp, rollout_logp, mask=None, *, cu_seqlens=None, slices=None, **options):
    args = simt.WeightArgs()
    args.layout.tokens = old_logp.numel()
    args.layout.sequences = old_logp.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    args.layout.padded_length = old_logp.shape[1] if cu_seqlens is None else 0
    args.layout.cu_seqlens = pointer(cu_seqlens)
    args.options.level = getattr(simt.WeightLevel, options.pop("level", "token"))
    args.options.mode = getattr(simt.WeightMode, options.pop("mode", "truncate"))
    for name, value in options.items():
        setattr(args.options, name, value)
    args.slices = slices or simt.policy_slices(args.layout)
    weights = tensor_like(old_logp)
    partials = torch.full((args.layout.sequences * args.slices, 2), NAN)
    row_weights, finished = torch.full((args.layout.sequences + 2,), NAN), torch.zeros(1, dtype=torch.int32)
    args.old_logp, args.rollout_logp, args.mask = map(pointer, (old_logp, rollout_logp, mask))
    args.weights, args.partials, args.row_weights, args.finished = map(pointer, (weights, partials, row_weights, finished))
    simt.cuda_importance_weights(args)
    return weights


def off_policy_mask(simt, advantages, logp, rollout_logp, mask=None, *, threshold, cu_seqlens=None, slices=None):
    args = simt.OffPolicyArgs()
    args.layout.tokens, args.layout.sequences = logp.numel(), len(advantages)
    args.layout.padded_length = logp.shape[1] if cu_seqlens is None else 0
    args.layout.cu_seqlens, args.threshold = pointer(cu_seqlens), threshold
    args.slices = slices or simt.policy_slices(args.layout)
    keep = torch.full((len(advantages),), 7, dtype=torch.uint8)
    partials, finished = torch.full((len(advantages) * args.slices, 2), NAN), torch.zeros(1, dtype=torch.int32)
    args.advantages, args.logp, args.rollout_logp, args.mask = map(pointer, (advantages, logp, rollout_logp, mask))
    args.keep, args.partials, args.finished = map(pointer, (keep, partials, finished))
    simt.cuda_off_policy_mask(args)
    return keep


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_importance_weights(simt, level, packed, masked):
    shape = (sum(LENGTHS),) if packed else (5, 83)
    old_logp, rollout_logp, _, mask = sample_policy(shape)
    if not masked:
        old_logp, rollout_logp = all_kept(old_logp, rollout_logp)
    mask = mask if masked else None
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).int() if packed else None
    for mode, normalize, slices in itertools.product(("truncate", "mask"), (False, True), (None, 3)):
        options = {"level": level, "mode": mode, "normalize": normalize, "clip_min": 0.8, "clip_max": 1.3, "log_clamp": 2.0}
        options["cu_seqlens"] = cu_seqlens
        weights = same_bits_in_every_order(
            simt, lambda o=options, n=slices: importance_weights(simt, old_logp, rollout_logp, mask, slices=n, **o)
        )
        close(weights, reference.importance_weights(old_logp.double(), rollout_logp.double(), mask, **options))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_off_policy_mask(simt, packed):
    shape, rows = ((sum(LENGTHS),), len(LENGTHS)) if packed else ((9, 83), 9)
    logp, rollout_logp, _, mask = sample_policy(shape)
    rollout_logp.view(-1)[1] = NAN
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).int() if packed else None
    for slices, threshold in itertools.product((None, 4), (-0.05, 0.0, 0.05)):
        advantages = torch.randn(rows)
        options = {"threshold": threshold, "cu_seqlens": cu_seqlens}
        keep = same_bits_in_every_order(
            simt,
            lambda a=advantages, n=slices, o=options: off_policy_mask(simt, a, logp, rollout_logp, mask, slices=n, **o),
        )
        expected = reference.off_policy_mask(advantages.double(), logp.double(), rollout_logp.double(), mask, **options)
        assert torch.equal(keep.bool(), expected)
        assert keep.le(1).all()


@pytest.mark.parametrize("lengths", WRONG_LAYOUTS)
def test_weights_and_choices_of_a_wrong_layout(simt, lengths):
    logp, ends = torch.zeros(40), torch.tensor(lengths, dtype=torch.int32)
    for level in ("sequence", "geometric"):
        assert importance_weights(simt, logp, logp, cu_seqlens=ends, level=level).isnan().all()
    assert not off_policy_mask(simt, torch.ones(len(lengths) - 1), logp, logp, threshold=0.0, cu_seqlens=ends).any()


def test_no_tokens_weigh_nothing(simt):
    simt.cuda_importance_weights(simt.WeightArgs())
    simt.cuda_off_policy_mask(simt.OffPolicyArgs())
    assert off_policy_mask(simt, -torch.ones(3), torch.empty(3, 0), torch.empty(3, 0), threshold=-1.0).tolist() == [0, 0, 0]
