"""The CUDA kernels of csrc/policy, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import INF, NAN, close, pointer, same_bits, same_bits_in_every_order, tensor_like

METRICS = (
    "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "ratio_mean", "ratio_min", "ratio_max",
    "approx_kl", "kl", "tokens",
)  # fmt: skip


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
    args.options.agg = getattr(simt.Aggregation, options.pop("agg", "token-mean").replace("-", "_"))
    args.options.kl = simt.KlKind.none if ref_logp is None else simt.KlKind.k3
    for name, value in options.items():
        setattr(args.options, name, INF if value is None else value)
    args.logp, args.old_logp, args.ref_logp, args.mask = map(pointer, (logp, old_logp, ref_logp, mask))
    args.advantages, args.token_advantages = pointer(advantages), advantages.shape == logp.shape
    args.slices = slices or simt.policy_slices(args.layout)

    unnormalised = tensor_like(logp) if into is None else into
    grad_logp = tensor_like(logp)
    scalars = {name: torch.full((), NAN) for name in ("loss", "inverse_norm")}
    metrics = torch.full((simt.POLICY_METRICS,), NAN)
    partials = torch.full((args.layout.sequences * args.slices, simt.POLICY_SUMS), NAN)
    finished = torch.zeros(1, dtype=torch.int32)
    args.grad = pointer(unnormalised) if with_grad else 0
    args.loss, args.inverse_norm = pointer(scalars["loss"]), pointer(scalars["inverse_norm"])
    args.metrics, args.partials, args.finished = map(pointer, (metrics, partials, finished))
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
    options["ref_logp"] = options["ref_logp"].double() if options.get("ref_logp") is not None else None
    expected = reference.policy_loss(leaf, old_logp.double(), advantages.double(), mask, **options)
    (3.0 * expected.loss).backward()
    close(out["loss"], expected.loss.detach(), atol=1e-6)
    close(out["metrics"], torch.stack([expected.metrics[name].double() for name in METRICS]), atol=1e-6, rtol=2e-6)
    close(out["grad"], leaf.grad, atol=1e-7, rtol=1e-5)
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


def test_no_rows_launch_nothing(simt):
    simt.cuda_policy_loss(simt.PolicyArgs())
    simt.cuda_policy_loss_backward(simt.PolicyGradArgs())
