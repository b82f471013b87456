"""The functions for slime's custom paths, called as slime calls them, in a stand-in of its training backend."""

import re
import warnings

import pytest
import torch
from torch.testing import assert_close

from integrations import slime_stand_in as slime
from integrations.pages import DOCS, blocks, paths
from integrations.rollouts import COLUMNS, LENGTHS, MASK, RECIPES, as_text, make
from prefkern import importance_weights
from prefkern.integrations import slime as integration
from prefkern.papers import Rollout, load_recipe, recipes

F32 = torch.float32
OWN = {"ppo", "reinforce_pp"}
NO_LOSS = {"copg", "disco", "reg_grpo", "trpa", "tppo"}
NO_ADVANTAGES = (NO_LOSS - {"reg_grpo"}) | OWN
PROMPT = 3
VOCABULARY = 7


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    slime.install(monkeypatch)
    monkeypatch.setattr(slime, "context_parallel", {"rank": 0, "size": 1})
    integration._warned.clear()


class Step:
    """One rollout of eight completions: logits of the current policy, and what slime's rollout data are made of."""

    def __init__(self, seed=0, dtype=F32, hole=True, sharpness=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.rollout, _, _ = make(seed, dtype)
        self.lengths = LENGTHS.tolist()
        self.totals = [n + PROMPT for n in self.lengths]
        self.tokens = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in self.totals]
        for i in (1, 2, 3):  # completions that begin alike
            n = min(self.lengths[0], self.lengths[i], 2)
            self.tokens[i][PROMPT : PROMPT + n] = self.tokens[0][PROMPT : PROMPT + n]
        self.logits = sharpness * torch.randn(1, sum(self.totals), VOCABULARY, generator=generator)
        self.masks = [torch.ones(n, dtype=torch.int) for n in self.lengths]
        self.mask = MASK.clone()
        if hole:  # a token of a tool
            self.masks[0][2] = 0
            self.mask[0, 2] = False

    def rows(self, padded):
        return [row[:n] for row, n in zip(padded, self.lengths, strict=True)]

    def data(self, partition=range(8)):
        """What a data-parallel rank has before advantages."""
        old, ref = self.rows(self.rollout.old_logp), self.rows(self.rollout.ref_logp)
        keep = list(partition)
        columns = {
            "tokens": self.tokens, "loss_masks": self.masks, "response_lengths": self.lengths, "total_lengths": self.totals,
            "log_probs": old, "ref_log_probs": ref, "rewards": [0.0] * 8,
        }  # fmt: skip
        data = {key: [column[i] for i in keep] for key, column in columns.items()}
        data["kl"] = [
            torch.zeros_like(slime.slice_log_prob_with_cp(data["log_probs"][k], self.totals[i], self.lengths[i]))
            for k, i in enumerate(keep)
        ]
        data["raw_reward"] = self.rollout.rewards.tolist()
        data["partition"] = keep
        return data

    def batch(self, data, rows=range(8), logits=None):
        """A micro-batch of a rank that has all completions."""
        rows = list(rows)
        ends = torch.tensor(self.totals).cumsum(0).tolist()
        logits = self.logits if logits is None else logits
        keys = ("advantages", "returns", "loss_masks", "response_lengths", "total_lengths", "log_probs", "ref_log_probs")
        batch = {key: [data[key][i] for i in rows] for key in keys}
        for key in ("log_probs", "ref_log_probs"):
            batch[key] = [
                slime.slice_log_prob_with_cp(x, self.totals[i], self.lengths[i]) for x, i in zip(batch[key], rows, strict=True)
            ]
        batch["unconcat_tokens"] = [self.tokens[i] for i in rows]
        batch["rollout_mask_sums"] = [self.masks[i].sum() for i in rows]
        batch["logits"] = torch.cat([logits[:, ends[i] - self.totals[i] : ends[i]] for i in rows], 1)
        return batch

    def of_policy(self, logits):
        """Log-probs and entropies [B, T], as the recipe takes them."""
        _, out = slime.get_log_probs_and_entropy(
            logits,
            args=slime.arguments(),
            unconcat_tokens=self.tokens,
            total_lengths=self.totals,
            response_lengths=self.lengths,
        )
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(out["log_probs"], batch_first=True), pad(out["entropy"], batch_first=True)

    def full_rollout(self, **changes):
        """The rollout with this step's masks and tokens."""
        tokens = torch.nn.utils.rnn.pad_sequence([t[PROMPT:] for t in self.tokens], batch_first=True)
        fields = {key: getattr(self.rollout, key) for key in ("rewards", "group", "old_logp", "ref_logp", "extra")}
        return Rollout(**fields | {"mask": self.mask, "tokens": tokens} | changes)


def step(args, made, micro_batches=(range(8),), data=None, logits=None):
    """(loss, gradient of the logits, metrics) of a training step with these functions."""
    data = made.data() if data is None else data
    if "advantages" not in data:
        integration.advantages(args, data)
    leaf = (made.logits if logits is None else logits).clone().requires_grad_()
    loss, metrics = slime.train_step(args, integration.loss, [made.batch(data, rows, leaf) for rows in micro_batches], 8)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


def expected_step(recipe, made, rollout=None):
    leaf = made.logits.clone().requires_grad_()
    logp, entropy = made.of_policy(leaf)
    loss = recipe.loss(logp, recipe.prepare(rollout or made.full_rollout()), entropy=entropy).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


# ----------------------------------------------------------------------------------------------------- recipes as a whole


def slime_setting(recipe):
    """--calculate-per-token-loss, as the recipe has it."""
    return getattr(recipe, "agg", "") == "token-mean" and getattr(recipe, "level", "") != "sequence"


@pytest.mark.parametrize("micro_batches", [(range(8),), (range(3), range(3, 8))], ids=["one", "two"])
@pytest.mark.parametrize("name", sorted(set(RECIPES) - NO_LOSS - OWN))
def test_a_recipe_in_slime_is_the_recipe(name, micro_batches):
    recipe, made = RECIPES[name], Step()
    if name == "gtpo":  # whose completions have no holes, and which looks at those that are sure only
        made = Step(hole=False, sharpness=3.0)
    data, rollout = made.data(), made.full_rollout()
    if name in ("gdpo", "mo_grpo"):
        several = torch.stack([rollout.rewards, rollout.rewards.flip(0)], 1)
        rollout, data["prefkern_rewards"] = made.full_rollout(rewards=several), several.tolist()
    for column in set(recipe.needs) & set(COLUMNS):
        data[column] = made.rollout.extra[column].tolist()
    args = slime.arguments(prefkern_recipe=as_text(recipe), calculate_per_token_loss=slime_setting(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, gradient, metrics = step(args, made, micro_batches, data)
    expected = expected_step(recipe, made, rollout)
    assert expected[1].abs().max() > 1e-5
    assert_close(loss, expected[0], rtol=1e-4, atol=1e-6)
    assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    assert {"pg_loss", "pg_clipfrac", "ppo_kl", "entropy_loss"} <= set(metrics)


@pytest.mark.parametrize("name", sorted(NO_LOSS | OWN))
def test_what_cannot_be_is_refused(name):
    made, args = Step(), slime.arguments(prefkern_recipe=name)
    if name in NO_ADVANTAGES:
        with pytest.raises(ValueError, match=f"recipe '{name}'.*slime"):
            integration.advantages(args, made.data())
    if name in NO_LOSS:
        data = made.data()
        data["advantages"] = data["returns"] = data["log_probs"]
        with pytest.raises(ValueError, match=f"recipe '{name}' has no loss for slime"):
            step(args, made, data=data)


def test_the_plain_loss_is_slimes():
    """The clipped loss, averaged over the tokens of each completion, as slime's own policy loss computes it."""
    made = Step(1)
    args = slime.arguments(prefkern_recipe="grpo:eps_low=0.1,eps_high=0.3", eps_clip=0.1, eps_clip_high=0.3)
    data = made.data()
    integration.advantages(args, data)

    def own(args, batch, logits, sum_of_sample_mean):
        _, out = slime.get_log_probs_and_entropy(
            logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
        )  # fmt: skip
        ratio = (torch.cat(out["log_probs"]) - torch.cat(batch["log_probs"])).exp()
        a = torch.cat(batch["advantages"])
        loss = sum_of_sample_mean(torch.maximum(-a * ratio, -a * ratio.clamp(0.9, 1.3)))
        return loss, {"ppo_kl": sum_of_sample_mean(-ratio.log()).detach()}

    leaf = made.logits.clone().requires_grad_()
    loss, metrics = slime.train_step(args, own, [made.batch(data, rows, leaf) for rows in (range(5), range(5, 8))], 8)
    (gradient,) = torch.autograd.grad(loss, leaf)
    mine = step(args, made, (range(5), range(5, 8)), data)
    assert_close(mine[0], loss.detach(), rtol=1e-5, atol=1e-7)
    assert_close(mine[1], gradient, rtol=1e-4, atol=1e-7)
    assert mine[2]["ppo_kl"] == pytest.approx(metrics["ppo_kl"], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("name", ["grpo", "ngrpo", "rloo", "dapo", "gpg", "reg_grpo"])
def test_groups_across_data_parallel_ranks(name):
    """Three ranks, no group whole on any: every rank has all rewards."""
    made, args = Step(), slime.arguments(prefkern_recipe=name)
    expected = recipes()[name].advantages(made.full_rollout())
    actual = torch.full((8,), torch.nan)
    for partition in ([0, 5, 7], [1, 2, 4], [6, 3]):
        data = made.data(partition)
        integration.advantages(args, data)
        for i, row in zip(partition, data["advantages"], strict=True):
            assert row.shape == (made.lengths[i],) and row.dtype == F32
            assert (row == row[0]).all()
            actual[i] = row[0]
    assert_close(actual, expected.float())


def test_what_reads_lengths_needs_whole_groups():
    made = Step()
    args = slime.arguments(prefkern_recipe="opo")
    data = made.data([4, 5, 6, 7])
    integration.advantages(args, data)
    expected = recipes()["opo"].advantages(made.full_rollout())[4:]
    assert_close(torch.stack([row[0] for row in data["advantages"]]), expected)
    with pytest.raises(ValueError, match=r"recipe 'opo' needs whole groups on each data-parallel rank"):
        integration.advantages(args, made.data([0, 1, 2, 4]))


def test_groups_that_dapo_drops_have_no_advantage():
    made = Step()
    data = made.data()
    data["raw_reward"] = [1.0, 1, 1, 1, 0, 1, 0, 1]
    integration.advantages(slime.arguments(prefkern_recipe="dapo:max_length=5,cache=2"), data)
    rows = torch.stack([row[0] for row in data["advantages"]])
    assert (rows[:4] == 0).all()
    assert rows[7] > 1


def test_wrong_rollout_data():
    made = Step()
    data = made.data()
    for name in ("grpo", "opo"):
        for options in ({"n_samples_per_prompt": 3, "rollout_batch_size": None}, {"rollout_batch_size": 3}):
            with pytest.raises(
                ValueError, match=r"raw_reward has 8 rewards, but .*: which of them belong to one prompt cannot"
            ):
                integration.advantages(slime.arguments(prefkern_recipe=name, **options), data)
    with pytest.raises(ValueError, match="recipe 'dagrpo' needs 'scores', which is not in slime's rollout data"):
        integration.advantages(slime.arguments(prefkern_recipe="dagrpo"), data)


def test_settings_that_contradict_the_recipes_advantages():
    made = Step()
    for options, message in (
        ({"normalize_advantages": True}, "--normalize-advantages would whiten"),
        ({"kl_coef": 0.1}, "--kl-coef has no place"),
        ({"prefkern_recipe": "grpo:beta=0.04"}, "recipe 'grpo' has beta"),
    ):
        with pytest.raises(ValueError, match=message):
            integration.advantages(slime.arguments(**{"prefkern_recipe": "grpo"} | options), made.data())


def test_which_recipe(monkeypatch):
    monkeypatch.delenv("PREFKERN_RECIPE", raising=False)
    with pytest.raises(ValueError, match="put prefkern_recipe: <recipe> into the file of --custom-config-path"):
        integration.advantages(slime.arguments(), Step().data())
    monkeypatch.setenv("PREFKERN_RECIPE", "ngrpo:r_max=2.0")
    assert integration.chosen(slime.arguments()) == load_recipe("ngrpo", r_max=2.0)
    assert integration.chosen(slime.arguments(prefkern_recipe="grpo")).name == "grpo"
    with pytest.raises(ValueError, match="did you mean 'ngrpo'"):
        integration.chosen(slime.arguments(prefkern_recipe="ngrp"))


def test_the_paths_are_functions():
    for name in ("advantages", "loss", "importance", "pg_loss_reducer"):
        assert slime.load_function(f"prefkern.integrations.slime.{name}") is getattr(integration, name)


# ----------------------------------------------------------------------------------------------------------------- loss


def test_entropy_and_kl_are_slimes():
    made = Step()
    plain = step(slime.arguments(prefkern_recipe="grpo"), made)
    both = step(
        slime.arguments(prefkern_recipe="grpo", entropy_coef=0.1, use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type="k2"), made
    )
    logp, entropy = made.of_policy(made.logits)
    count = made.mask.sum(1)
    mean_entropy = ((entropy * made.mask).sum(1) / count).mean()
    kl = (((logp - made.rollout.ref_logp).square() / 2 * made.mask).sum(1) / count).mean()
    assert_close(both[0], plain[0] - 0.1 * mean_entropy + 0.2 * kl, rtol=1e-5, atol=1e-6)
    assert both[2]["entropy_loss"] == pytest.approx(mean_entropy.item(), rel=1e-5)
    assert both[2]["kl_loss"] == pytest.approx(kl.item(), rel=1e-5)
    assert (both[1] - plain[1]).abs().max() > 1e-4


def test_without_old_log_probs_the_step_is_on_policy():
    made = Step()
    args = slime.arguments(prefkern_recipe="grpo")
    data = made.data()
    integration.advantages(args, data)
    batch = made.batch(data)
    del batch["log_probs"]
    loss, metrics = integration.loss(args, batch, batch["logits"], slime.sample_means(args, batch))
    rows = torch.stack([row[0] for row in data["advantages"]])
    assert_close(loss, -rows.sum(), atol=1e-5, rtol=1e-5)
    assert metrics["ppo_kl"] == 0


@pytest.mark.parametrize("path", [None, "prefkern.integrations.slime.importance"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gmpo"])
def test_truncated_importance_sampling(name, path):
    """Slime's own weights, or ours, which at the level of tokens are the same, in the recipe's loss."""
    made, recipe = Step(), recipes()[name]
    args = slime.arguments(
        prefkern_recipe=name, use_tis=True, tis_clip=1.1, tis_clip_low=0.7, custom_tis_function_path=path,
        calculate_per_token_loss=slime_setting(recipe),
    )  # fmt: skip
    sampled = made.rollout.old_logp + 0.5 * torch.linspace(-1, 1, 48).view(8, 6)
    data = made.data()
    integration.advantages(args, data)
    leaf = made.logits.clone().requires_grad_()
    batch = made.batch(data, logits=leaf) | {"rollout_log_probs": made.rows(sampled)}
    loss, metrics = slime.train_step(args, integration.loss, [batch], 8)
    weights = importance_weights(made.rollout.old_logp, sampled, made.mask, clip_min=0.7, clip_max=1.1)
    if name == "gmpo":
        weights = ((weights.clamp_min(1e-10).log() * made.mask).sum(1) / made.mask.sum(1)).exp()
    prepared = recipe.prepare(made.full_rollout(token_weight=weights))
    logp, entropy = made.of_policy(leaf)
    expected = recipe.loss(logp, prepared, entropy=entropy).loss
    unweighted = recipe.loss(logp, recipe.prepare(made.full_rollout()), entropy=entropy).loss
    assert (expected - unweighted).abs() > 1e-3
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert 0 < metrics["tis_clipfrac"] < 1
    if name == "grpo":
        away = (made.rollout.old_logp - sampled).abs()
        ratio = (logp.detach() - made.rollout.old_logp).exp()
        for key, value in (("train_rollout_logprob_abs_diff", away), ("ois", ratio)):
            mean = ((value * made.mask).sum(1) / made.mask.sum(1)).mean().item()
            assert metrics[key] == pytest.approx(mean, rel=1e-5)
    both = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, expected)]
    assert_close(*both, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["grpo", "dapo", "etr", "cispo", "rloo:level=token", "dr_grpo:max_length=6"])
def test_context_parallel(name):
    """Two ranks that have halves of every completion: their losses and gradients sum up to the whole."""
    made, recipe = Step(), load_recipe(name)
    per_token = slime_setting(recipe)
    whole = step(slime.arguments(prefkern_recipe=name, calculate_per_token_loss=per_token), made)
    parts = []
    for rank in range(2):
        slime.context_parallel.update(rank=rank, size=2)
        parts.append(step(slime.arguments(prefkern_recipe=name, calculate_per_token_loss=per_token), made))
    assert min(part[1].abs().max() for part in parts) > 1e-5
    assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-5, atol=1e-6)
    assert_close(parts[0][1] + parts[1][1], whole[1], rtol=1e-4, atol=1e-7)


def test_a_context_parallel_rank_without_tokens():
    """Two short completions after prompts that fill the first half: the loss is 0, and the gradient flows."""
    slime.context_parallel.update(rank=1, size=2)
    args = slime.arguments(prefkern_recipe="dr_grpo:max_length=4")
    tokens = [torch.tensor([1, 2, 3, 4, 5, 6, 0, 1])] * 2
    batch = {
        "unconcat_tokens": tokens, "total_lengths": [8, 8], "response_lengths": [1, 1], "loss_masks": [torch.ones(1)] * 2,
        "rollout_mask_sums": [torch.tensor(1)] * 2, "log_probs": [torch.zeros(0)] * 2, "advantages": [torch.zeros(0)] * 2,
        "returns": [torch.zeros(0)] * 2,
    }  # fmt: skip
    logits = torch.randn(1, 16, VOCABULARY, requires_grad=True)
    loss, metrics = integration.loss(args, batch, logits, slime.sample_means(args, batch))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    assert set(metrics) >= {"loss", "pg_clipfrac", "ppo_kl"}


@pytest.mark.parametrize("name", ["gspo", "gmpo", "rloo", "gtpo"])
def test_losses_of_whole_completions_refuse_context_parallel(name):
    made = Step(hole=False)
    data = made.data()
    integration.advantages(slime.arguments(prefkern_recipe=name), data)
    args = slime.arguments(prefkern_recipe=name, context_parallel_size=2)
    with pytest.raises(ValueError, match=f"context_parallel_size is 2; recipe '{name}' needs whole completions"):
        step(args, made, data=data)


def test_settings_that_contradict_the_recipes_loss():
    made = Step()
    for options, message in (
        ({"eps_clip_high": 0.28}, r"--eps-clip-high is 0\.28, but recipe 'grpo' uses 0\.2"),
        ({"eps_clip_c": 3.0}, r"--eps-clip-c is 3\.0, but recipe 'grpo' uses None"),
        ({"prefkern_recipe": "etr", "eps_clip": 0.1}, r"--eps-clip is 0\.1, but recipe 'etr' uses 0\.2"),
        ({"use_opsm": True}, "--use-opsm is set"),
        ({"custom_pg_loss_reducer_function_path": "a.b"}, "--custom-pg-loss-reducer-function-path is set"),
        ({"prefkern_recipe": "gmpo", "calculate_per_token_loss": True}, "'gmpo' has one loss per completion"),
        ({"prefkern_recipe": "dr_grpo"}, "recipe 'dr_grpo' has max_length None"),
        ({"prefkern_recipe": "gtpo:variant=code"}, "variant 'code'"),
    ):
        with pytest.raises(ValueError, match=message):
            step(slime.arguments(**{"prefkern_recipe": "grpo"} | options), Step(hole=False))
    args = slime.arguments(prefkern_recipe="ppo", eps_clip_c=3.0, calculate_per_token_loss=True)
    step(args, made, data=made.data() | dict.fromkeys(
        ("advantages", "returns"), made.rows(torch.ones(8, 6))
    ))  # fmt: skip


def test_another_aggregation_than_the_recipes_is_said_once():
    made = Step()
    with pytest.warns(
        UserWarning, match="recipe 'dapo' sums up tokens by token-mean, but slime is set to the mean over"
    ) as seen:
        for _ in range(2):
            step(slime.arguments(prefkern_recipe="dapo"), made)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="recipe 'grpo' sums up tokens by seq-mean-token-mean, but slime is set to the mean"):
        step(slime.arguments(prefkern_recipe="grpo", calculate_per_token_loss=True), made)


# ------------------------------------------------------------------------------------------- importance weights, reducer


def test_importance_weights_of_tokens_are_slimes():
    made = Step()
    sampled = made.rollout.old_logp + 0.5 * torch.linspace(-1, 1, 48).view(8, 6)
    keywords = {
        "pg_loss": torch.linspace(-1, 1, sum(made.lengths)), "train_log_probs": made.rows(made.rollout.old_logp),
        "rollout_log_probs": made.rows(sampled), "loss_masks": made.masks, "total_lengths": made.totals,
        "response_lengths": made.lengths,
    }  # fmt: skip
    args = slime.arguments(tis_clip=1.2, tis_clip_low=0.8)
    theirs, mine = slime.vanilla_tis_function(args, **keywords), integration.importance(args=args, **keywords)
    assert_close(mine[0], theirs[0])
    assert mine[1] is made.masks
    for key, value in theirs[2].items():
        assert_close(mine[2][key], value)


@pytest.mark.parametrize(("level", "mode"), [("sequence", "truncate"), ("geometric", "mask"), ("token", "mask")])
def test_importance_weights_of_other_levels(level, mode):
    made = Step()
    sampled = made.rollout.old_logp + 0.5 * torch.linspace(-1, 1, 48).view(8, 6)
    args = slime.arguments(tis_clip=1.2, tis_clip_low=0.8, prefkern_tis_level=level, prefkern_tis_mode=mode)
    weighted, _, metrics = integration.importance(
        args, pg_loss=torch.ones(sum(made.lengths)), train_log_probs=made.rows(made.rollout.old_logp),
        rollout_log_probs=made.rows(sampled), loss_masks=made.masks,
    )  # fmt: skip
    mask = made.mask if level != "token" else MASK
    expected = importance_weights(
        made.rollout.old_logp, sampled, mask, level=level, mode=mode, clip_min=0.8, clip_max=1.2, log_clamp=None
    )
    assert_close(weighted, expected[MASK])
    assert 0 < metrics["tis_clipfrac"].mean() < 1
    if level != "token":
        with pytest.raises(ValueError, match="context_parallel_size is 2"):
            integration.importance(
                slime.arguments(prefkern_tis_level=level, context_parallel_size=2), pg_loss=torch.ones(1),
                train_log_probs=[torch.zeros(1)], rollout_log_probs=[torch.zeros(1)], loss_masks=[torch.ones(1)],
            )  # fmt: skip


def test_the_reducer_of_dr_grpo(monkeypatch):
    made = Step()
    monkeypatch.setenv("PREFKERN_RECIPE", "dr_grpo:max_length=10")
    x = torch.linspace(-1, 1, sum(made.lengths), requires_grad=True)
    reduce = integration.pg_loss_reducer(made.totals, made.lengths, made.masks, False)
    mask = torch.cat(made.masks).bool()
    assert_close(reduce(x), x[mask].sum() / 10)
    poisoned = x.detach().where(mask, torch.nan)
    assert reduce(poisoned).isfinite()
    slime.context_parallel.update(size=2)
    total = 0
    for rank in range(2):
        slime.context_parallel.update(rank=rank)
        mine = torch.cat([
            slime.slice_log_prob_with_cp(row, t, n)
            for row, t, n in zip(x.split(made.lengths), made.totals, made.lengths, strict=True)
        ])  # fmt: skip
        total = total + integration.pg_loss_reducer(made.totals, made.lengths, made.masks)(mine)
    assert_close(total, x[mask].sum() / 10)
    with pytest.raises(ValueError, match="--calculate-per-token-loss is set"):
        integration.pg_loss_reducer(made.totals, made.lengths, made.masks, True)
    for other in ("grpo", "dr_grpo"):
        monkeypatch.setenv("PREFKERN_RECIPE", other)
        with pytest.raises(ValueError, match=f"PREFKERN_RECIPE is '{other}'; this reducer is for dr_grpo:max_length="):
            integration.pg_loss_reducer(made.totals, made.lengths, made.masks)


def test_the_page(monkeypatch):
    """Its functions exist, its flags are slime's, and its configuration chooses what it says."""
    flags = set(re.findall(r"--[\w-]+", (DOCS / "slime.md").read_text()))
    assert flags <= set(slime.FLAGS), flags - set(slime.FLAGS)
    for path in paths("slime.md"):
        assert callable(slime.load_function(path))
    first, second = blocks("slime.md", "yaml")
    assert load_recipe(settings(first)["prefkern_recipe"]) == load_recipe("ngrpo", r_max=2.0)
    made = Step()
    args = slime.arguments(**settings(second))
    _, _, metrics = integration.importance(
        args, pg_loss=torch.ones(sum(made.lengths)), train_log_probs=made.rows(made.rollout.old_logp),
        rollout_log_probs=made.rows(made.rollout.ref_logp), loss_masks=made.masks,
    )  # fmt: skip
    assert metrics["tis"].shape == (sum(made.lengths),)
    (exported,) = [block for block in blocks("slime.md", "bash") if "export" in block]
    name, value = re.search(r'export (\w+)="(.*)"', exported).groups()
    monkeypatch.setenv(name, value)
    assert integration.pg_loss_reducer([4], [2], [torch.ones(2)])(torch.ones(2)) == 2 / 4096


def settings(block):
    """key: value of a flat YAML file."""
    pairs = re.findall(r"^(\w+): *\"?([^\"#\n]*?)\"? *(?:#.*)?$", block, re.MULTILINE)
    assert pairs
    return dict(pairs)
