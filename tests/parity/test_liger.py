"""Ours against the installed Liger-Kernel: its fused linear losses of pairs, on hidden states and the weight of a head.

Liger takes log-probabilities and losses in float32, whatever comes, so float32 it is.
"""

import pytest
import torch
from torch.testing import assert_close

import prefkern
from parity.batches import F32, close
from parity.pairs import make_pairs, response_sums
from prefkern.papers import Pairs, load_pair_recipe

liger = pytest.importorskip("liger_kernel.chunked_loss")

HIDDEN, VOCABULARY, IGNORE = 8, 19, -100
BETA = 0.1
each_seed = pytest.mark.parametrize("seed", range(3))


def make_heads(batch, seed):
    """Hidden states [2P, T, H], weight [V, H] and bias [V] of policy and reference, and targets [2P, T]."""
    generator = torch.Generator().manual_seed(seed + 300)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    policy = [normal(*batch.mask.shape, HIDDEN), normal(VOCABULARY, HIDDEN), normal(VOCABULARY)]
    reference = [x + 0.2 * normal(*x.shape) for x in policy]
    targets = torch.randint(VOCABULARY, batch.mask.shape, generator=generator).masked_fill(~batch.mask, IGNORE)
    return policy, reference, targets


def value_and_gradients(loss, policy):
    """Of hidden states, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in policy]
    out = loss(*leaves)
    value, rest = out if isinstance(out, tuple) else (out, None)
    return value.detach(), torch.autograd.grad(value, leaves), rest


def theirs(module, batch, seed, *, with_reference=False, factor=1.0, **more):
    policy, reference, targets = make_heads(batch, seed)
    if with_reference:
        more |= dict(zip(("ref_input", "ref_weight", "ref_bias"), reference, strict=True))

    def loss(hidden, weight, bias):
        value, rest = module(weight, hidden, targets, bias, **more)
        return value * factor, rest

    return value_and_gradients(loss, policy)


def ours(api, loss, batch, seed, *, with_reference=False):
    """`loss(tokens [2P, T], *sums of the reference)`"""
    policy, reference, targets = make_heads(batch, seed)

    def tokens(hidden, weight, bias):
        return api.linear_logprobs(hidden, weight, targets, bias=bias, ignore_index=IGNORE).logp

    refs = response_sums(tokens(*reference), batch.mask) if with_reference else ()
    return value_and_gradients(lambda *leaves: loss(tokens(*leaves), *refs), policy)


def same(mine, expected):
    close(mine[0], expected[0], F32)
    for ours, theirs in zip(mine[1], expected[1], strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * theirs.abs().max().item())


def nll(api, tokens, mask):
    return -api.masked_aggregate(tokens.chunk(2)[0], mask.chunk(2)[0], agg="token-mean")


def our_loss(api, batch, seed, *, with_reference=False, sft=0.0, outer=1.0, **options):
    if options.get("average"):
        options["chosen_lengths"], options["rejected_lengths"] = batch.lengths

    def loss(tokens, *refs):
        out = api.preference_loss(*response_sums(tokens, batch.mask), *refs, **options)
        value = outer * out.loss
        return (value + sft * nll(api, tokens, batch.mask) if sft else value), out.metrics

    return ours(api, loss, batch, seed, with_reference=with_reference)


# -------------------------------------------------------------------------------------------------------------------- DPO

SMOOTHING = 0.1
SMOOTHED = {"label_smoothing": SMOOTHING}
DPO = {name: {} for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")}
DPO |= {"exo_pair": SMOOTHED, "robust": SMOOTHED, "discopop": {}}
each_dpo = pytest.mark.parametrize("name", DPO)


@each_dpo
@pytest.mark.parametrize("chunk_size", [1, 3])
@each_seed
def test_dpo(api, name, chunk_size, seed):
    batch = make_pairs(seed, F32, pairs=6)
    module = liger.LigerFusedLinearDPOLoss(beta=BETA, loss_type=name, compiled=False, chunk_size=chunk_size, **DPO[name])
    expected = theirs(module, batch, seed, with_reference=True)
    same(our_loss(api, batch, seed, kind=name, beta=BETA, with_reference=True, **DPO[name]), expected)


@pytest.mark.parametrize("name", ["sigmoid", "sppo_hard"])
def test_dpo_of_means_and_with_a_likelihood(api, name):
    batch = make_pairs(3, F32)
    module = liger.LigerFusedLinearDPOLoss(
        beta=2.0, alpha=0.3, loss_type=name, compute_nll_loss=True, average_log_prob=True, compiled=False
    )
    expected = theirs(module, batch, 3, with_reference=True)
    same(our_loss(api, batch, 3, kind=name, beta=2.0, average="logp", sft=0.3, with_reference=True), expected)


@each_dpo
def test_dpo_without_reference(api, name):
    batch = make_pairs(4, F32)
    module = liger.LigerFusedLinearDPOLoss(beta=BETA, loss_type=name, use_ref_model=False, compiled=False, **DPO[name])
    same(our_loss(api, batch, 4, kind=name, beta=BETA, **DPO[name]), theirs(module, batch, 4))


def test_dpo_metrics(api):
    """Of what Liger returns beside the loss: sums of log-probabilities, and rewards, of every pair."""
    batch = make_pairs(5, F32)
    module = liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False)
    chosen_logp, rejected_logp, *_, chosen, rejected = theirs(module, batch, 5, with_reference=True)[2]
    mine = our_loss(api, batch, 5, beta=BETA, with_reference=True)[2]
    assert chosen_logp.shape == rejected_logp.shape == (batch.pairs,)
    close(mine["chosen_reward"], chosen.mean(), F32)
    close(mine["rejected_reward"], rejected.mean(), F32)
    close(mine["accuracy"], (chosen > rejected).float().mean(), F32)


def test_ipo_is_not_in_liger():
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        liger.LigerFusedLinearDPOLoss(loss_type="ipo")
    logp = torch.zeros(2)
    with pytest.raises(NotImplementedError, match="ipo"):
        liger.dpo_loss.LigerFusedLinearDPOFunction.preference_loss_fn(logp, logp, torch.zeros(4, 3), loss_type="ipo")


def test_every_loss_of_liger_is_here():
    assert set(DPO) == liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES


def test_sigmoid_with_label_smoothing_is_plain_dpo_in_liger(api):
    batch = make_pairs(6, F32)
    module = liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False, label_smoothing=SMOOTHING)
    expected = theirs(module, batch, 6, with_reference=True)
    same(our_loss(api, batch, 6, beta=BETA, with_reference=True), expected)
    assert our_loss(api, batch, 6, beta=BETA, with_reference=True, **SMOOTHED)[0] != expected[0]


@pytest.mark.parametrize(("name", "smoothing"), [("exo_pair", 0.0), ("robust", 0.5), ("robust", 0.7)])
def test_both_refuse_smoothing_out_of_range(name, smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        liger.LigerFusedLinearDPOLoss(loss_type=name, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="label_smoothing"):
        our_loss(prefkern, make_pairs(0, F32), 0, kind=name, label_smoothing=smoothing)


def test_the_gradient_is_scaled_by_what_comes_from_above(api):
    batch = make_pairs(7, F32)
    module = liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False)
    expected = theirs(module, batch, 7, with_reference=True, factor=3.0)
    same(our_loss(api, batch, 7, beta=BETA, with_reference=True, outer=3.0), expected)


# ----------------------------------------------------------------------------------------------------- CPO, SimPO and ORPO


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
@pytest.mark.parametrize("sft", [0.0, 0.4])
@each_seed
def test_cpo(api, smoothing, sft, seed):
    batch = make_pairs(seed, F32)
    module = liger.LigerFusedLinearCPOLoss(
        beta=BETA, alpha=sft, label_smoothing=smoothing, compute_nll_loss=sft > 0, compiled=False
    )
    same(our_loss(api, batch, seed, beta=BETA, label_smoothing=smoothing, sft=sft), theirs(module, batch, seed))


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
@each_seed
def test_simpo(api, smoothing, seed):
    batch = make_pairs(seed, F32)
    module = liger.LigerFusedLinearSimPOLoss(
        beta=2.0, gamma=0.7, label_smoothing=smoothing, compute_nll_loss=False, compiled=False
    )
    mine = our_loss(api, batch, seed, beta=2.0, average="logp", offset=0.7, label_smoothing=smoothing)
    same(mine, theirs(module, batch, seed))


def test_simpo_as_liger_has_it_by_default_is_mostly_a_likelihood(api):
    batch = make_pairs(3, F32)
    expected = theirs(liger.LigerFusedLinearSimPOLoss(compiled=False), batch, 3)
    same(our_loss(api, batch, 3, beta=0.1, average="logp", offset=0.5, sft=1.0), expected)
    assert our_loss(api, batch, 3, beta=0.1, average="logp", offset=0.5)[0] < 0.5 * expected[0]


@each_seed
@pytest.mark.parametrize("sft", [0.0, 1.0])
def test_orpo(api, sft, seed):
    """The likelihood is that of the chosen responses; what may be given besides is a target of its own, as with prompts."""
    batch = make_pairs(seed, F32)
    module = liger.LigerFusedLinearORPOLoss(beta=0.5, compute_nll_loss=sft > 0, compiled=False)
    mine = our_loss(api, batch, seed, beta=1.0, score="log_odds", average="logp", outer=0.5, sft=sft)
    same(mine, theirs(module, batch, seed))


def test_orpo_with_a_likelihood_of_prompt_and_response(api):
    """As in TRL."""
    batch = make_pairs(4, F32)
    policy, _, targets = make_heads(batch, 4)
    outside = batch.inside & ~batch.mask
    with_prompt = torch.where(outside, torch.arange(targets.shape[1]), targets)
    module = liger.LigerFusedLinearORPOLoss(beta=0.5, compiled=False)
    expected = theirs(module, batch, 4, nll_target=with_prompt)

    def loss(hidden, weight, bias):
        tokens = api.linear_logprobs(hidden, weight, with_prompt, bias=bias, ignore_index=IGNORE).logp
        chosen, rejected = batch.lengths
        odds = api.preference_loss(
            *response_sums(tokens, batch.mask), beta=1.0, score="log_odds", average="logp",
            chosen_lengths=chosen, rejected_lengths=rejected,
        ).loss  # fmt: skip
        return 0.5 * odds + nll(api, tokens, batch.inside)

    same(value_and_gradients(loss, policy), expected)


def test_orpo_of_what_is_nearly_certain():
    """Liger takes 1 - p from a rounded p: infinite log-odds where they are about 18, and a gradient that is NaN."""
    certain, likely = torch.tensor([-2e-8, -0.5]), torch.tensor([-0.7, -0.9])
    liger_loss = liger.orpo_loss.LigerFusedLinearORPOFunction.preference_loss_fn

    def gradient(loss, chosen):
        leaf = chosen.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    assert liger_loss(certain, likely, torch.zeros(4, 3))[-1].isinf()
    assert gradient(lambda leaf: liger_loss(leaf, likely, torch.zeros(4, 3))[0], certain)[0].isnan()

    def odds(chosen, rejected):
        return prefkern.preference_loss(chosen, rejected, beta=1.0, score="log_odds")

    exact, single = odds(certain.double(), likely.double()), odds(certain, likely)
    close(single.loss, exact.loss, F32)
    close(single.metrics["reward_margin"], exact.metrics["reward_margin"], F32)
    assert 17 < odds(certain[:1].double(), likely[:1].double()).metrics["reward_margin"] < 18
    expected = gradient(lambda leaf: odds(leaf, likely.double()).loss, certain.double())
    assert_close(gradient(lambda leaf: odds(leaf, likely).loss, certain).double(), expected, rtol=1e-4, atol=0)


def test_empty_responses_of_means_are_nan_in_liger_and_refused_here():
    batch = make_pairs(5, F32)
    batch.mask[2] = False
    module = liger.LigerFusedLinearSimPOLoss(beta=2.0, compute_nll_loss=False, compiled=False)
    assert theirs(module, batch, 5)[0].isnan()
    with pytest.raises(ValueError, match="chosen_lengths"):
        our_loss(prefkern, batch, 5, beta=2.0, average="logp", offset=0.5)


# -------------------------------------------------------------------------------------------------------------------- KTO


def judged(seed, pairs=4):
    batch = make_pairs(seed, F32, pairs=pairs)
    label = torch.rand(len(batch.mask), generator=torch.Generator().manual_seed(seed)) < 0.5
    label[:2] = torch.tensor([True, False])
    return batch, label


def their_kto(batch, seed, label, kl, **options):
    policy, reference, targets = make_heads(batch, seed)
    module = liger.LigerFusedLinearKTOLoss(use_ref_model=True, compiled=False, **options)
    refs = dict(zip(("ref_input", "ref_weight", "ref_bias"), reference, strict=True))
    return value_and_gradients(
        lambda hidden, weight, bias: module(hidden, weight, targets, bias, preference_labels=label, kl=kl, **refs), policy
    )


def our_kto(api, batch, seed, label, kl, **options):
    def loss(tokens, *refs):
        out = api.unpaired_loss(tokens.where(batch.mask, 0.0).sum(1), torch.cat(refs), label, kl=kl, **options)
        return out.loss, out.metrics

    return ours(api, loss, batch, seed, with_reference=True)


@pytest.mark.parametrize("kl", [0.0, 0.8])
@pytest.mark.parametrize("chunk_size", [1, 4])
@each_seed
def test_kto(api, kl, chunk_size, seed):
    batch, label = judged(seed)
    expected = their_kto(batch, seed, label, torch.tensor(kl), beta=0.3, chunk_size=chunk_size)
    mine = our_kto(api, batch, seed, label, torch.tensor(kl), beta=0.3)
    same(mine, expected)
    chosen, rejected = expected[2][-2:]
    close(mine[2]["chosen_reward"], chosen / label.sum(), F32)
    close(mine[2]["rejected_reward"], rejected / (~label).sum(), F32)


def test_a_negative_kl_is_0_here_and_itself_in_liger(api):
    """TRL clamps the estimate before it passes it on."""
    batch, label = judged(3)
    negative, zero = torch.tensor(-0.8), torch.tensor(0.0)
    mine = our_kto(api, batch, 3, label, negative, beta=0.3)
    same(mine, their_kto(batch, 3, label, zero, beta=0.3))
    assert not torch.isclose(mine[0], their_kto(batch, 3, label, negative, beta=0.3)[0], rtol=1e-3)


def test_kto_has_no_weights_in_liger(api):
    batch, label = judged(4)
    with pytest.raises(TypeError, match="desirable_weight"):
        liger.LigerFusedLinearKTOLoss(desirable_weight=1.33)
    kl = torch.tensor(0.2)
    weighted = our_kto(api, batch, 4, label, kl, beta=0.3, desirable_weight=1.33, undesirable_weight=0.8)
    plain = their_kto(batch, 4, label, kl, beta=0.3)
    assert not torch.isclose(weighted[0], plain[0], rtol=1e-3)
    same(our_kto(api, batch, 4, label, kl, beta=0.3, desirable_weight=1.0, undesirable_weight=1.0), plain)


# ------------------------------------------------------------------------------------------------------- recipes, by name

RECIPES = {
    "dpo:beta=0.3": (liger.LigerFusedLinearDPOLoss, {"beta": 0.3}),
    "robust_dpo": (liger.LigerFusedLinearDPOLoss, {"loss_type": "robust"} | SMOOTHED),
    "apo_anchored:anchor=down": (liger.LigerFusedLinearDPOLoss, {"loss_type": "apo_down"}),
    "rpo:nll_weight=0.4": (liger.LigerFusedLinearDPOLoss, {"alpha": 0.4, "compute_nll_loss": True}),
    "cpo:cpo_alpha=0.4": (liger.LigerFusedLinearCPOLoss, {"alpha": 0.4}),
    "simpo:gamma=0.7": (liger.LigerFusedLinearSimPOLoss, {"beta": 2.0, "gamma": 0.7, "compute_nll_loss": False}),
    "orpo:beta=0.5": (liger.LigerFusedLinearORPOLoss, {"beta": 0.5}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(api, name):
    batch = make_pairs(8, F32)
    module, options = RECIPES[name]
    with_reference = module is liger.LigerFusedLinearDPOLoss
    expected = theirs(module(**options, compiled=False), batch, 8, with_reference=with_reference)
    _, reference, targets = make_heads(batch, 8)
    ref_logp = api.linear_logprobs(*reference[:2], targets, bias=reference[2], ignore_index=IGNORE).logp

    def loss(tokens):
        out = load_pair_recipe(name).loss(Pairs(tokens, batch.mask, ref_logp if with_reference else None))
        return out.loss, out.metrics

    same(ours(api, loss, batch, 8), expected)
