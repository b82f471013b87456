"""Ours against the functions of the installed verl: advantages, policy losses, KL, aggregation, rollout correction.

Their masks come in the type of the values: with integers verl's 1e-8 is added in float32, where it is lost.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from parity.batches import DTYPES, F32, F64, close, make, names, ours, same, value_and_gradient

pytest.importorskip("verl", minversion="0.9")

from tensordict import TensorDict
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.torch_functional import masked_whiten
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

each_seed = pytest.mark.parametrize("seed", range(3))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=names)
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])

# ----------------------------------------------------------------------------------------------------------- advantages


ALONE = -3  # the group of the smallest size


def outcomes(seed, dtype=F64, smallest=1, kind="normal"):
    """rewards [B], group [B] of unequal sizes in random order, mask [B, T], verl's token_level_rewards [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [smallest, smallest + 1, 3, 6, 4]
    group = torch.cat([torch.full((size,), 7 * i + ALONE) for i, size in enumerate(sizes)])
    group = group[torch.randperm(len(group), generator=generator)]
    if kind == "binary":
        rewards = torch.randint(0, 2, group.shape, generator=generator).to(dtype)
    else:
        rewards = (torch.randn(group.shape, generator=generator) * 2**10).round().div(2**10).to(dtype)
    lengths = torch.randint(1, 10, group.shape, generator=generator)
    mask = torch.arange(10) < lengths[:, None]
    return rewards, group, mask, at_the_end(rewards, lengths)


def at_the_end(rewards, lengths):
    token_level = rewards.new_zeros(len(rewards), 10)
    token_level[torch.arange(len(rewards)), lengths - 1] = rewards
    return token_level


def verl_advantages(name, token_level, mask, group=None, **options):
    """[B, T]"""
    if group is not None:
        options["index"] = np.array([f"uid-{i}" for i in group.tolist()], dtype=object)
    return core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=token_level.clone(), response_mask=mask.to(token_level.dtype), **options
    )[0]


OUTCOME = {
    "grpo": ("grpo", {}, {"estimator": "grpo", "eps": 1e-6, "singleton": "reward"}),
    "grpo without std": ("grpo", {"norm_adv_by_std_in_grpo": False}, {"estimator": "dr_grpo", "singleton": "reward"}),
    "grpo_vectorized": ("grpo_vectorized", {}, {"estimator": "grpo", "eps": 1e-6, "singleton": "reward"}),
    "grpo_vectorized without std": (
        "grpo_vectorized",
        {"norm_adv_by_std_in_grpo": False},
        {"estimator": "dr_grpo", "singleton": "reward"},
    ),
    "rloo": ("rloo", {}, {"estimator": "rloo", "singleton": "reward"}),
    "rloo_vectorized": ("rloo_vectorized", {}, {"estimator": "rloo", "singleton": "zero"}),
    "opo": ("opo", {}, {"estimator": "opo", "singleton": "reward"}),
    "gpg": ("gpg", {}, {"estimator": "dr_grpo", "batch": "nonzero", "singleton": "reward"}),
}
IN_FLOAT32 = ("grpo_vectorized", "gpg")  # mean and standard deviation of one, the factor of the other, whatever the rewards


@each_seed
@each_dtype
@pytest.mark.parametrize("kind", ["normal", "binary"])
@pytest.mark.parametrize("case", OUTCOME)
def test_outcome_advantages(api, case, kind, seed, dtype):
    name, their_options, options = OUTCOME[case]
    rewards, group, mask, token_level = outcomes(seed, dtype, kind=kind)
    if name == "opo":
        options = options | {"lengths": mask.sum(1)}
    expected = verl_advantages(name, token_level, mask, group, **their_options)
    actual = api.group_advantages(rewards, group, **options).advantages[:, None] * mask
    if case == "grpo":  # the 1 + eps of a group of one is a float32 in verl
        alone = group == ALONE
        close(actual[alone], expected[alone], F32)
        actual, expected = actual[~alone], expected[~alone]
    close(actual, expected, F32 if name in IN_FLOAT32 else dtype)


@each_seed
@each_dtype
@pytest.mark.parametrize("with_std", [True, False])
def test_pass_at_k(api, seed, dtype, with_std):
    rewards, group, mask, token_level = outcomes(seed, dtype, smallest=2)
    expected = verl_advantages("grpo_passk", token_level, mask, group, config=AlgoConfig(norm_adv_by_std_in_grpo=with_std))
    estimator = "pass_at_k" if with_std else "pass_at_k_no_std"
    actual = api.group_advantages(rewards, group, estimator=estimator, eps=1e-6).advantages
    assert (actual != 0).sum() == group.unique().numel()
    close(actual[:, None] * mask, expected, dtype)


def test_pass_at_k_of_a_singleton_is_an_error_in_verl_and_zero_here(api):
    rewards, group, mask, token_level = outcomes(0)
    alone = group == ALONE
    assert alone.sum() == 1
    with pytest.raises(ValueError, match="at least 2 samples"):
        verl_advantages("grpo_passk", token_level, mask, group, config=AlgoConfig())
    assert api.group_advantages(rewards, group, estimator="pass_at_k").advantages[alone].item() == 0


@each_seed
@each_dtype
def test_reinforce_plus_plus_baseline(api, seed, dtype):
    rewards, group, mask, token_level = outcomes(seed, dtype)
    expected = verl_advantages("reinforce_plus_plus_baseline", token_level, mask, group)
    centred = api.group_advantages(rewards, group, estimator="dr_grpo", singleton="reward").advantages
    spread = torch.where(mask, centred[:, None], torch.nan)
    close(api.whiten(spread, mask), expected, dtype)
    at_once = api.group_advantages(
        rewards, group, estimator="dr_grpo", singleton="reward", batch="token", lengths=mask.sum(1)
    ).advantages
    close(at_once[:, None] * mask, expected, dtype)


@each_seed
@each_dtype
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(api, seed, dtype, gamma):
    batch = make(seed, dtype)
    rewards, mask = batch.token_advantages, batch.mask
    advantages, returns = core_algos.get_adv_estimator_fn("reinforce_plus_plus")(
        token_level_rewards=rewards, response_mask=mask.to(dtype), config=AlgoConfig(gamma=gamma)
    )
    mine = api.discounted_returns(rewards.masked_fill(~mask, torch.nan), mask, gamma=gamma)
    close(mine, returns, dtype)
    close(api.whiten(mine, mask), advantages, dtype)


@each_seed
@each_dtype
def test_remax(api, seed, dtype):
    """Ours is 0 where a token does not count; verl's return there is that of the next token that does."""
    batch = make(seed, dtype)
    rewards, mask, baselines = batch.token_advantages, batch.mask, batch.advantages
    advantages, returns = core_algos.get_adv_estimator_fn("remax")(
        token_level_rewards=rewards, response_mask=mask.to(dtype), reward_baselines=baselines
    )
    mine = api.discounted_returns(rewards.masked_fill(~mask, torch.nan), mask, gamma=1.0)
    close(mine, returns * mask, dtype)
    close(mine - baselines[:, None] * mask, advantages * mask, dtype)
    assert (returns[~mask] != 0).any()
    assert (mine[~mask] == 0).all()


@each_seed
@each_dtype
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae(api, seed, dtype, gamma, lam):
    """With holes in the mask. verl whitens the advantages after it has taken the returns."""
    batch = make(seed, dtype)
    rewards, values, mask = batch.token_advantages, batch.old_logp, batch.mask
    advantages, returns = core_algos.get_adv_estimator_fn("gae")(rewards, values, mask.to(dtype), gamma, lam)
    hidden = [t.masked_fill(~mask, torch.nan) for t in (rewards, values)]
    mine = api.gae(*hidden, mask, gamma=gamma, lam=lam, bootstrap="zero")
    close(mine.returns, returns * mask, dtype)
    close(api.whiten(mine.advantages, mask), advantages * mask, dtype)


@each_seed
@each_dtype
def test_whiten(api, seed, dtype):
    batch = make(seed, dtype)
    expected = masked_whiten(batch.logp, batch.weight) * batch.mask
    close(api.whiten(batch.nan_outside().logp, batch.mask), expected, dtype)
    moments = api.batch_moments(batch.nan_outside().logp, batch.mask)
    close(api.whiten(batch.nan_outside().logp, batch.mask, moments=moments), expected, dtype)


def gdpo(rewards, group, mask, weights):
    """verl looks rewards up by name and puts them on the last token itself, in float32."""
    keys = [f"reward {k}" for k in range(rewards.shape[1])]
    prompts = torch.zeros(len(rewards), 3, dtype=torch.long)
    return verl_advantages(
        "gdpo",
        torch.zeros(mask.shape),
        mask,
        group,
        config=AlgoConfig(gdpo_reward_keys=keys, gdpo_reward_weights=weights),
        non_tensor_batch={key: column.numpy() for key, column in zip(keys, rewards.unbind(1), strict=True)},
        batch={"prompts": prompts, "attention_mask": torch.cat([torch.ones_like(prompts), mask.long()], 1)},
    )


@each_seed
@each_dtype
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_gdpo(api, seed, dtype, weights):
    rewards, group, mask, _ = outcomes(seed, dtype)
    rewards = torch.stack([rewards, rewards.flip(0) > 0, rewards.roll(1).abs()], 1)
    actual = api.group_advantages(
        rewards, group, estimator="grpo", eps=1e-6, singleton="reward", weights=weights,
        combine="normalize_then_sum", batch="token", lengths=mask.sum(1),
    ).advantages  # fmt: skip
    close(actual[:, None] * mask, gdpo(rewards, group, mask, weights), F32)


@each_seed
def test_gdpo_of_one_reward_in_float64(api, seed):
    """Without reward names verl falls back to the token rewards, and keeps their type."""
    rewards, group, mask, token_level = outcomes(seed, smallest=2)
    expected = verl_advantages("gdpo", token_level, mask, group)
    actual = api.group_advantages(
        rewards[:, None], group, eps=1e-6,
        combine="normalize_then_sum", batch="token", lengths=mask.sum(1),
    ).advantages  # fmt: skip
    close(actual[:, None] * mask, expected)


def test_a_group_of_one_is_zero_unless_asked(api):
    """verl's grpo, opo, gpg and rloo give a group of one its reward; its own rloo_vectorized gives 0. Ours: 0, or "reward"."""
    rewards, group, mask, token_level = outcomes(0)
    (alone,) = (group == ALONE).nonzero().flatten().tolist()
    for name, estimator in (("grpo", "grpo"), ("rloo", "rloo"), ("opo", "opo")):
        theirs = verl_advantages(name, token_level, mask, group)[alone, 0]
        assert_close(theirs, rewards[alone], rtol=2e-6, atol=0)
        lengths = mask.sum(1) if name == "opo" else None
        assert api.group_advantages(rewards, group, estimator=estimator, lengths=lengths).advantages[alone].item() == 0
    assert verl_advantages("rloo_vectorized", token_level, mask, group)[alone, 0].item() == 0


def test_equal_rewards_give_exactly_zero_here_and_rounding_over_eps_in_verl(api):
    rewards = torch.full((12,), 0.7)
    group = torch.zeros(12, dtype=torch.long)
    theirs = verl_advantages("grpo", rewards[:, None], torch.ones(12, 1), group)
    assert theirs.abs().min() > 0.1
    assert (api.group_advantages(rewards, group, eps=1e-6).advantages == 0).all()


def test_gpg_counts_rewards_that_are_not_zero_not_gradients(api):
    """As verl does: the paper would count samples whose advantage is not 0. A group of ones counts, and has no gradient."""
    rewards, group = torch.tensor([1.0, 1, 1, 0, 1, 0], dtype=F64), torch.tensor([0, 0, 0, 1, 1, 1])
    actual = api.group_advantages(rewards, group, estimator="dr_grpo", batch="nonzero").advantages
    close(actual, verl_advantages("gpg", rewards[:, None], torch.ones(6, 1), group)[:, 0])
    close(actual, 6 / 4 * torch.tensor([0, 0, 0, -1 / 3, 2 / 3, -1 / 3], dtype=F64))


def test_nan_rewards_are_an_error_here_and_spread_over_the_group_in_verl(api):
    rewards, group = torch.tensor([1.0, float("nan"), 0, 2, 3, 4]), torch.tensor([0, 0, 0, 1, 1, 1])
    theirs = verl_advantages("grpo", rewards[:, None], torch.ones(6, 1), group)[:, 0]
    assert theirs.isnan().tolist() == [True, True, True, False, False, False]
    with pytest.raises(ValueError, match="rewards"):
        api.group_advantages(rewards, group)


def test_whitening_one_token_is_an_error_in_both(api):
    values, mask = torch.ones(2, 3), torch.tensor([[True, False, False], [False, False, False]])
    with pytest.raises(ValueError, match="sum of the mask is one"):
        masked_whiten(values, mask)
    with pytest.raises(ValueError):
        api.whiten(values, mask)


# ---------------------------------------------------------------------------------------------------------- aggregation

AGGREGATIONS = {  # mode -> what they are given, what we are given
    "token-mean": ({}, {}),
    "token-sum": ({}, {}),
    "seq-mean-token-sum": ({}, {}),
    "seq-mean-token-sum-norm": ({}, {}),
    "seq-mean-token-mean": ({}, {}),
    "token-mean of a global batch": ({"batch_num_tokens": 170, "dp_size": 4}, {"norm": 170 / 4}),
    "seq-mean-token-sum of a global batch": ({"global_batch_size": 24, "dp_size": 4}, {"norm": 24 / 4}),
    "seq-mean-token-mean of a global batch": ({"global_batch_size": 24, "dp_size": 4}, {"norm": 24 / 4}),
    "seq-mean-token-sum-norm with a factor": ({"loss_scale_factor": 100}, {"scale": 100.0}),
    "seq-mean-token-sum-norm of a global batch": (
        {"loss_scale_factor": 100, "global_batch_size": 24, "dp_size": 4},
        {"scale": 100.0, "norm": 24 / 4},
    ),
}
each_agg = pytest.mark.parametrize("case", AGGREGATIONS)


def aggregation(case):
    return case.split(" ")[0], *AGGREGATIONS[case]


@each_agg
@each_dtype
@each_seed
def test_aggregation(api, case, dtype, seed):
    agg, theirs, options = aggregation(case)
    batch = make(seed, dtype)
    mine = ours(api.masked_aggregate, batch, (), agg=agg, **options)
    same(mine, value_and_gradient(lambda x: core_algos.agg_loss(x, batch.weight, agg, **theirs), batch.logp), dtype)


@packed_or_not
def test_aggregation_of_packed_sequences(api, packed):
    batch = make(0)
    for case in AGGREGATIONS:
        agg, theirs, options = aggregation(case)
        if agg.endswith("norm"):  # verl's default factor is the padded length, which packed sequences do not have
            options = {"scale": float(batch.mask.shape[1])} | options
        mine = ours(api.masked_aggregate, batch, (), packed=packed, agg=agg, **options)
        same(mine, value_and_gradient(lambda x, a=agg, t=theirs: core_algos.agg_loss(x, batch.weight, a, **t), batch.logp))


@pytest.mark.parametrize("agg", [case for case in AGGREGATIONS if " " not in case])
def test_nan_outside_the_mask_stays_outside_here_and_leaks_in_the_sequence_modes_of_verl(api, agg):
    batch = make(1)
    theirs = core_algos.agg_loss(batch.nan_outside().logp, batch.weight, agg)
    assert theirs.isnan().item() is agg.startswith("seq-")
    mine = api.masked_aggregate(batch.nan_outside().logp, batch.mask, agg=agg)
    close(mine, core_algos.agg_loss(batch.logp, batch.weight, agg))


def test_the_small_number_under_the_mean_is_lost_in_verl_with_an_integer_mask(api):
    """Up to 1e-8 apart in practice, therefore."""
    batch = make(2)
    mine = api.masked_aggregate(batch.logp, batch.mask, agg="seq-mean-token-mean")
    with_floats, with_integers = (
        core_algos.agg_loss(batch.logp, mask, "seq-mean-token-mean") for mask in (batch.weight, batch.mask.long())
    )
    assert_close(mine, with_floats, rtol=1e-14, atol=0)
    assert 1e-10 < abs(mine / with_integers - 1) < 1e-8


@pytest.mark.parametrize("agg", [case for case in AGGREGATIONS if " " not in case])
def test_an_empty_mask_is_zero_here_and_nan_in_the_means_of_verl(api, agg):
    values, mask = torch.ones(2, 3, dtype=F64, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    assert core_algos.agg_loss(values, mask, agg).isnan().item() is (agg != "token-sum")
    loss = api.masked_aggregate(values, mask, agg=agg)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, values)[0] == 0).all()


# -------------------------------------------------------------------------------------------------------- policy losses


def actor(global_batch_info=None, **options):
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    config.global_batch_info.update(global_batch_info or {})
    return config


def verl_policy(name, batch, config, agg="token-mean", advantages="advantages", weights=None):
    """(loss, gradient, metrics) of a registered loss."""
    a = getattr(batch, advantages)
    a = a[:, None].expand_as(batch.logp) if a.dim() == 1 else a

    def loss(leaf):
        return core_algos.get_policy_loss_fn(name)(
            old_log_prob=batch.old_logp, log_prob=leaf, advantages=a, response_mask=batch.weight,
            loss_agg_mode=agg, config=config, rollout_is_weights=weights,
        )  # fmt: skip

    return value_and_gradient(loss, batch.logp)


BOUNDS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
CLIP = {"eps_low": 0.2, "eps_high": 0.28}
POLICIES = {
    "vanilla": (
        BOUNDS | {"clip_ratio_c": 1.5},
        {"kind": "clip", "dual_clip": 1.5, "ratio_clamp": 20.0} | CLIP,
    ),
    "gspo": (
        {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
        {"kind": "gspo_token", "eps_low": 0.02, "eps_high": 0.03, "ratio_clamp": (None, 10.0)},
    ),
    "sapo": ({"tau_pos": 1.0, "tau_neg": 1.05}, {"kind": "sapo", "tau_pos": 1.0, "tau_neg": 1.05, "ratio_clamp": 20.0}),
    "gpg": ({}, {"kind": "reinforce"}),
    "cispo": (BOUNDS, {"kind": "cispo", "ratio_clamp": 20.0} | CLIP),
}
AGGREGATED = [name for name in POLICIES if name != "sapo"]  # verl's sapo has one aggregation, whatever is asked for


@pytest.mark.parametrize("advantages", ["advantages", "token_advantages"])
@pytest.mark.parametrize("name", POLICIES)
@packed_or_not
@each_dtype
@each_seed
def test_policy_losses(api, name, seed, dtype, packed, advantages):
    theirs, options = POLICIES[name]
    batch = make(seed, dtype)
    agg = "seq-mean-token-mean"
    expected = verl_policy(name, batch, actor(**theirs), agg, advantages)
    mine = ours(api.policy_loss, batch, ("old_logp", advantages), packed=packed, agg=agg, **options)
    same(mine, expected, dtype)


@pytest.mark.parametrize("name", AGGREGATED)
@each_agg
@each_dtype
def test_policy_losses_in_each_aggregation(api, name, case, dtype):
    agg, info, options = aggregation(case)
    theirs, policy = POLICIES[name]
    batch = make(3, dtype)
    expected = verl_policy(name, batch, actor(info, **theirs), agg)
    same(ours(api.policy_loss, batch, ("old_logp", "advantages"), agg=agg, **policy, **options), expected, dtype)


def test_sapo_of_verl_has_one_aggregation(api):
    theirs, options = POLICIES["sapo"]
    batch = make(0)
    by_token, by_sequence = (verl_policy("sapo", batch, actor(**theirs), agg) for agg in ("token-mean", "seq-mean-token-mean"))
    assert torch.equal(by_token[0], by_sequence[0])
    mine = ours(api.policy_loss, batch, ("old_logp", "advantages"), agg="token-mean", **options)
    assert abs(mine[0] - by_token[0]) > 1e-4


@pytest.mark.parametrize("name", POLICIES)
@packed_or_not
@each_dtype
def test_policy_losses_with_rollout_weights(api, name, packed, dtype):
    theirs, options = POLICIES[name]
    batch = make(4, dtype)
    agg = "seq-mean-token-mean"
    expected = verl_policy(name, batch, actor(**theirs), agg, weights=batch.weights)
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), packed=packed,
        tensors={"token_weight": "weights"}, agg=agg, **options,
    )  # fmt: skip
    same(mine, expected, dtype)


def shrunk(batch):
    """The mean over the tokens that verl makes of an advantage that is the same for all."""
    return batch.advantages * batch.weight.sum(1) / (batch.weight.sum(1) + 1e-8)


@packed_or_not
@each_dtype
@each_seed
def test_geo_mean(api, seed, dtype, packed):
    """verl takes the mean over all rows, where an empty one counts and adds 0, and shrinks the advantage by 1e-8."""
    batch = make(seed, dtype)
    expected = verl_policy("geo_mean", batch, actor(**BOUNDS))
    batch.advantages = shrunk(batch)
    mine = ours(api.policy_loss, batch, ("old_logp", "advantages"), packed=packed, kind="gmpo", agg="trl-grpo", **CLIP)
    same(mine, expected, dtype)


@each_dtype
def test_geo_mean_with_rollout_weights(api, dtype):
    """verl takes the geometric mean of the weights of a sequence, with 1e-10 and 1e-8 against zeros."""
    batch = make(4, dtype)
    expected = verl_policy("geo_mean", batch, actor(**BOUNDS), weights=batch.weights)
    count = batch.weight.sum(1)
    batch.advantages = shrunk(batch)
    weight = (((batch.weights + 1e-10).log() * batch.mask).sum(1) / (count + 1e-8)).exp()
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), tensors={"token_weight": weight}, kind="gmpo", agg="trl-grpo",
        **CLIP,
    )  # fmt: skip
    same(mine, expected, dtype)


def one_by_one(function, batch):
    """Loss and gradient of every token that counts, as a sequence of its own: [n], [n]."""
    out = [function(replace_tokens(batch, row, column)) for row, column in batch.mask.nonzero().tolist()]
    return torch.stack([o[0] for o in out]), torch.cat([o[1].flatten() for o in out])


def replace_tokens(batch, row, column):
    cut = {name: value[row : row + 1, column : column + 1] for name, value in vars(batch).items() if value.dim() == 2}
    return type(batch)(**cut, advantages=batch.advantages[row : row + 1], lengths=torch.ones(1, dtype=torch.long))


@pytest.mark.parametrize("name", POLICIES)
def test_policy_losses_of_single_tokens_far_away(api, name):
    """Log-ratios up to +-60: what is clamped, and where the gradient ends, token by token."""
    theirs, options = POLICIES[name]
    batch = make(5, spread=20.0)
    config = actor(**theirs)
    agg = "seq-mean-token-mean" if name == "sapo" else "token-mean"
    assert ((batch.logp - batch.old_logp)[batch.mask].abs() > 20).sum() > 5
    loss, gradient = one_by_one(lambda b: verl_policy(name, b, config), batch)
    mine, my_gradient = one_by_one(lambda b: ours(api.policy_loss, b, ("old_logp", "advantages"), agg=agg, **options), batch)
    assert_close(mine, loss, rtol=1e-9, atol=1e-12)
    assert_close(my_gradient, gradient, rtol=1e-9, atol=1e-12)


@each_seed
def test_clip_fractions(api, seed):
    """verl's pg_clipfrac is our low plus high, pg_clipfrac_lower our dual; its means are float32 with 1e-8 below."""
    theirs, options = POLICIES["vanilla"]
    batch = make(seed)
    metrics = verl_policy("vanilla", batch, actor(**theirs))[2]
    mine = ours(api.policy_loss, batch, ("old_logp", "advantages"), **options)[2]
    assert metrics["actor/pg_clipfrac"] > 0
    assert metrics["actor/pg_clipfrac_lower"] > 0
    fraction = mine["clip_fraction_low"] + mine["clip_fraction_high"]
    assert fraction.item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6)
    assert mine["clip_fraction_dual"].item() == pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-6)


def test_approx_kl_is_k3_here_and_k1_in_verl(api):
    theirs, options = POLICIES["vanilla"]
    batch = make(0)
    metrics = verl_policy("vanilla", batch, actor(**theirs))[2]
    mine = ours(api.policy_loss, batch, ("old_logp", "advantages"), **options)[2]
    d = (batch.logp - batch.old_logp)[batch.mask]
    assert metrics["actor/ppo_kl"] == pytest.approx(-d.mean().item(), rel=1e-6)
    assert mine["approx_kl"].item() == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-9)


def test_dual_clip_is_off_here_unless_asked_for_and_always_on_in_verl(api):
    batch = make(0, spread=1.5)
    expected = verl_policy("vanilla", batch, actor())
    same(ours(api.policy_loss, batch, ("old_logp", "advantages"), dual_clip=3.0), expected)
    assert ours(api.policy_loss, batch, ("old_logp", "advantages"))[0] > expected[0] + 1e-3


# ------------------------------------------------------------------------------------------------------------------- KL

KL = {
    "kl": {"kl": "k1"},
    "k1": {"kl": "k1"},
    "abs": {"kl": "abs"},
    "mse": {"kl": "k2"},
    "k2": {"kl": "k2"},
    "low_var_kl": {"kl": "k3", "kl_clamp": 10.0},
    "k3": {"kl": "k3", "kl_clamp": 10.0},
    "kl+": {"kl": "k1+"},
    "k1+": {"kl": "k1+"},
    "abs+": {"kl": "abs+"},
    "mse+": {"kl": "k2"},
    "low_var_kl+": {"kl": "k3+", "kl_clamp": 10.0},
    "k3+": {"kl": "k3+", "kl_clamp": 10.0},
}


def verl_kl(name, batch, agg="token-mean", **info):
    def loss(leaf):
        return core_algos.agg_loss(core_algos.kl_penalty(leaf, batch.ref_logp, name), batch.weight, agg, **info)

    return value_and_gradient(loss, batch.logp)


@pytest.mark.parametrize("name", KL)
@packed_or_not
@each_dtype
@each_seed
def test_kl(api, name, seed, dtype, packed):
    batch = make(seed, dtype)
    mine = ours(api.kl_penalty, batch, ("ref_logp",), packed=packed, **KL[name])
    same(mine, verl_kl(name, batch), dtype)


@pytest.mark.parametrize("name", KL)
def test_kl_of_single_tokens_far_away(api, name):
    """Differences up to +-60: k3 is clamped to 10, with no gradient there, unless "+" takes that of k2."""
    batch = make(6, spread=20.0)
    value, gradient = one_by_one(lambda b: verl_kl(name, b), batch)
    mine, my_gradient = one_by_one(lambda b: ours(api.kl_penalty, b, ("ref_logp",), **KL[name]), batch)
    assert ((value == 10) & (gradient == 0)).any().item() is (name in ("low_var_kl", "k3"))
    assert_close(mine, value, rtol=1e-9, atol=1e-12)
    assert_close(my_gradient, gradient, rtol=1e-9, atol=1e-12)


def test_kl_is_not_clamped_here_unless_asked_for(api):
    batch = make(6, spread=4.0)
    clamped = ours(api.kl_penalty, batch, ("ref_logp",), kl="k3", kl_clamp=10.0)
    same(clamped, verl_kl("low_var_kl", batch))
    assert ours(api.kl_penalty, batch, ("ref_logp",), kl="k3")[0] > clamped[0] + 1


@each_agg
@pytest.mark.parametrize("name", ["k1", "low_var_kl", "k3+"])
def test_policy_loss_with_kl(api, case, name):
    """verl aggregates the penalty by itself, without rollout weights, and adds it."""
    agg, info, options = aggregation(case)
    theirs, policy = POLICIES["vanilla"]
    batch = make(7)
    policy_part = verl_policy("vanilla", batch, actor(info, **theirs), agg, weights=batch.weights)
    kl_part = verl_kl(name, batch, agg, **info)
    expected = [a + 0.3 * b for a, b in zip(policy_part[:2], kl_part[:2], strict=True)]
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), tensors={"ref_logp": "ref_logp", "token_weight": "weights"},
        agg=agg, beta=0.3, **policy, **KL[name], **options,
    )  # fmt: skip
    same(mine, expected)


# -------------------------------------------------------------------------------------------------------- a whole actor


def worker_loss(batch, config, info):
    """verl's actor loss as its workers call it: log-probabilities of prompt and response tokens in one row, TensorDict."""
    inside = (torch.arange(batch.mask.shape[1]) < batch.lengths[:, None]).long()
    prompts = torch.ones(len(inside), 2, dtype=torch.long)
    tensors = {
        "prompts": prompts,
        "responses": inside,
        "attention_mask": torch.cat([prompts, inside], 1),
        "response_mask": batch.mask.long(),
        "old_log_probs": batch.old_logp,
        "ref_log_prob": batch.ref_logp,
        "rollout_is_weights": batch.weights,
        "advantages": batch.advantages[:, None].expand_as(batch.logp),
    }
    info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | info

    def loss(leaf):
        data = TensorDict({name: value.clone() for name, value in tensors.items()}, batch_size=len(inside))
        for name, value in info.items():
            data.set_non_tensor(name, value)
        edge = leaf.new_zeros(1)  # a token's own log-probability stands one place before it
        rows = [torch.cat([edge, row[:length], edge]) for row, length in zip(leaf, batch.lengths.tolist(), strict=True)]
        return ppo_loss(config, {"log_probs": torch.cat(rows)}, data)

    return value_and_gradient(loss, batch.logp)


@pytest.mark.parametrize("case", [case for case in AGGREGATIONS if "factor" not in case and "norm" not in case])
@pytest.mark.parametrize("name", AGGREGATED)
@packed_or_not
def test_the_loss_of_a_worker(api, name, case, packed):
    """Policy term with rollout weights, and KL, each aggregated over the global batch."""
    agg, info, options = aggregation(case)
    theirs, policy = POLICIES[name]
    batch = make(9)
    config = actor(
        policy_loss=PolicyLossConfig(loss_mode=name), loss_agg_mode=agg, use_kl_loss=True, kl_loss_coef=0.2,
        kl_loss_type="low_var_kl", **theirs,
    )  # fmt: skip
    expected = worker_loss(batch, config, info)
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), packed=packed, agg=agg, beta=0.2, kl="k3", kl_clamp=10.0,
        tensors={"ref_logp": "ref_logp", "token_weight": "weights"}, **policy, **options,
    )  # fmt: skip
    if agg == "seq-mean-token-mean":  # its mask is of integers
        assert_close(mine[0], expected[0], rtol=2e-8, atol=1e-8)
        assert_close(mine[1], expected[1], rtol=2e-8, atol=1e-9)
    else:
        same(mine, expected)


@each_agg
@each_dtype
def test_reinforce_with_rollout_weights(api, case, dtype):
    """What verl calls bypass mode: no old policy but the engine's."""
    agg, info, options = aggregation(case)
    batch = make(10, dtype)
    config = actor(info)
    expected = value_and_gradient(
        lambda leaf: core_algos.compute_policy_loss_reinforce(
            batch.rollout_logp, leaf, batch.advantages[:, None], batch.weight, agg, config, batch.weights
        ),
        batch.logp,
    )
    mine = ours(
        api.policy_loss, batch, ("rollout_logp", "advantages"), tensors={"token_weight": "weights"}, kind="reinforce",
        agg=agg, **options,
    )  # fmt: skip
    same(mine, expected, dtype)


# --------------------------------------------------------------------------------------------------- rollout correction


def verl_weights(batch, level, threshold, normalize=False):
    weights, _, _ = compute_rollout_correction_and_rejection_mask(
        batch.old_logp, batch.rollout_logp, batch.weight,
        rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=normalize,
    )  # fmt: skip
    return weights.batch["rollout_is_weights"]


def our_weights(api, batch, **options):
    hidden = batch.nan_outside()
    return api.importance_weights(hidden.old_logp, hidden.rollout_logp, batch.mask, **options)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("threshold", "options"), [
    (1.2, {"mode": "truncate", "clip_max": 1.2}),
    ("2.0", {"mode": "truncate", "clip_max": 2.0}),
    ("0.7_1.4", {"mode": "mask", "clip_min": 0.7, "clip_max": 1.4}),
])  # fmt: skip
@pytest.mark.parametrize("level", ["token", "sequence"])
@each_dtype
@each_seed
def test_rollout_weights(api, level, threshold, options, normalize, dtype, seed):
    batch = make(seed, dtype)
    expected = verl_weights(batch, level, threshold, normalize)
    actual = our_weights(api, batch, level=level, normalize=normalize, **options)
    if normalize and level == "sequence":  # verl's mean of equal weights in a sequence is theirs times n / (n + 1e-8)
        assert_close(actual, expected, rtol=2e-8 if dtype == F64 else 1e-5, atol=0)
    else:
        close(actual, expected, dtype)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollout_weights_far_away(api, level):
    """Log-ratios are clamped to +-20, those of a sequence after they are summed up."""
    batch = make(8, spread=40.0)
    expected = verl_weights(batch, level, 1e12)
    assert expected.max() == pytest.approx(np.exp(20))
    actual = our_weights(api, batch, level=level, clip_max=1e12)
    assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("option", "level"), [("token_k1", "token"), ("seq_sum_k1", "sequence"), ("seq_mean_k1", "geometric")])
@each_seed
def test_rejection_by_k1(api, option, level, seed):
    """verl bounds the ratio rollout / training, ours its inverse; what is rejected has weight 0 here."""
    batch = make(seed)
    _, kept, _ = compute_rollout_correction_and_rejection_mask(
        batch.old_logp, batch.rollout_logp, batch.weight, rollout_rs=option, rollout_rs_threshold="0.8_1.3"
    )
    weights = our_weights(api, batch, level=level, mode="mask", clip_min=1 / 1.3, clip_max=1 / 0.8)
    assert 0 < kept.sum() < batch.mask.sum()
    assert torch.equal(weights > 0, kept.bool())


def test_rollout_weights_of_an_empty_mask_are_an_error_in_verl_and_zero_here(api):
    logp, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one valid token"):
        compute_rollout_correction_and_rejection_mask(logp, logp, mask, rollout_is="token")
    assert (api.importance_weights(logp, logp, mask) == 0).all()
