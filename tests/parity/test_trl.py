"""Ours against the installed TRL: its trainers' own methods, on prepared log-probabilities, completions and rewards."""

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from parity.batches import DTYPES, F32, F64, close, make, names, ours, same, value_and_gradient

trl = pytest.importorskip("trl", minversion="1.16")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

each_seed = pytest.mark.parametrize("seed", range(3))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=names)
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])

GROUP = 5  # completions of a prompt. TRL's count / (count - 1) is a float32; 5 / 4, and 65 / 64 for 13 prompts, are exact in it
MAX_LENGTH = 29
EPS = 1e-4  # TRL's, everywhere

# -------------------------------------------------------------------------------------------------- trainers on a string


def build(trainer_class, config_class, path, output):
    options = {
        "output_dir": str(output), "per_device_train_batch_size": GROUP, "num_generations": GROUP, "bf16": False,
        "max_completion_length": MAX_LENGTH, "report_to": "none", "use_cpu": True, "gradient_checkpointing": False,
    }  # fmt: skip
    trainer = trainer_class(
        model=path,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config_class(**options),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a b"] * GROUP}),
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    return trainer


@pytest.fixture(scope="module")
def grpo_trainer(model_path, tmp_path_factory):
    return build(trl.GRPOTrainer, trl.GRPOConfig, model_path, tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def rloo_trainer(model_path, tmp_path_factory):
    return build(trl.RLOOTrainer, trl.RLOOConfig, model_path, tmp_path_factory.mktemp("rloo"))


class Theirs:
    """A trainer whose model, generation and rewards are replaced by given tensors."""

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.monkeypatch = trainer, monkeypatch

    def settings(self, **settings):
        """Attributes of the trainer, or of its arguments; undone after the test."""
        for name, value in settings.items():
            owner = self.trainer if hasattr(self.trainer, name) else self.trainer.args
            assert hasattr(owner, name), f"this TRL has no {name}"
            self.monkeypatch.setattr(owner, name, value)

    def inputs(self, batch, **more):
        """What `_generate_and_score_completions` would return; holes in the mask are tool tokens."""
        rows, columns = batch.mask.shape
        inside = torch.arange(columns) < batch.lengths[:, None]
        return {
            "prompt_ids": torch.ones(rows, 2, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
            "completion_ids": torch.ones(rows, columns, dtype=torch.long),
            "completion_mask": inside.long(),
            "tool_mask": batch.mask.long(),
            "advantages": batch.advantages,
            "old_per_token_logps": batch.old_logp,
            "ref_per_token_logps": batch.ref_logp,
            "num_items_in_batch": batch.mask.sum(),
            **more,
        }

    def loss(self, batch, *, method=None, inputs=None, **settings):
        """(loss, gradient, metrics)"""
        self.settings(**settings)
        inputs = self.inputs(batch) if inputs is None else inputs
        self.trainer._metrics["train"].clear()
        method = self.trainer.compute_loss if method is None else method

        def loss(leaf):
            self.monkeypatch.setattr(
                self.trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (leaf, batch.entropy, None)
            )
            return method(self.trainer.model, inputs)

        value, gradient, _ = value_and_gradient(loss, batch.logp)
        return value, gradient, {name: values[0] for name, values in self.trainer._metrics["train"].items()}

    def rollout(self, rewards, *, logp=None, ref_logp=None, sampling=None, lengths=None, mask=None, weights=None, **settings):
        """`_generate_and_score_completions` with these rewards [B, K], and log-probabilities [B, T] of the completions."""
        self.settings(**settings)
        rows, kinds = rewards.shape
        lengths = [3] * rows if lengths is None else lengths.tolist()
        logp = torch.zeros(rows, max(lengths)) if logp is None else logp
        reference = object()
        completions = [[3] * length for length in lengths]
        tools = None if mask is None else [row[:length].long().tolist() for row, length in zip(mask, lengths, strict=True)]
        scores = None if sampling is None else [row[:n].tolist() for row, n in zip(sampling, lengths, strict=True)]
        generated = ([[3, 4]] * rows, completions, tools, ["c"] * rows, scores, {}, None, None)
        if isinstance(self.trainer, trl.RLOOTrainer):
            generated = ([[3, 4]] * rows, completions, ["c"] * rows)
        replaced = {
            "reward_funcs": [None] * kinds,
            "reward_func_names": [f"reward {k}" for k in range(kinds)],
            "reward_weights": torch.ones(kinds) if weights is None else weights,
            "ref_model": reference,
            "_calculate_rewards": lambda *args: rewards.clone(),
            "_generate": lambda prompts: generated,
            "_get_per_token_logps_and_entropies": lambda model, *args, **kwargs: (
                ref_logp if model is reference else logp, None, None
            ),
        }  # fmt: skip
        for name, value in replaced.items():
            self.monkeypatch.setattr(self.trainer, name, value)
        return self.trainer._generate_and_score_completions([{"prompt": "a b"}] * rows)


@pytest.fixture
def grpo(grpo_trainer, monkeypatch):
    return Theirs(grpo_trainer, monkeypatch)


@pytest.fixture
def rloo(rloo_trainer, monkeypatch):
    return Theirs(rloo_trainer, monkeypatch)


def test_the_hooks_are_hit(grpo, rloo):
    """What this file replaces exists in the installed release, and the losses below come from it."""
    for trainer in (grpo.trainer, rloo.trainer):
        for name in ("_generate", "_calculate_rewards", "_get_per_token_logps_and_entropies", "_compute_loss"):
            assert name in vars(type(trainer)), name
    batch = make(0)
    first, second = (grpo.loss(batch, loss_type=kind) for kind in ("grpo", "sapo"))
    assert first[0] != second[0]
    with pytest.raises(ValueError, match="Unknown loss type"):
        grpo.loss(batch, loss_type="nothing")


# --------------------------------------------------------------------------------------------------------------- losses

CLIP = {"eps_low": 0.2, "eps_high": 0.28, "ratio_clamp": None}
BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.28}
TAU_NEG = torch.tensor(1.05).item()  # TRL's torch.where makes float32 of its temperatures, whatever the type of the rest
LOSSES = {
    "grpo": (BOUNDS, {"agg": "trl-grpo"} | CLIP),
    "bnpo": (BOUNDS, {"agg": "token-mean"} | CLIP),
    "dr_grpo": (BOUNDS, {"agg": "trl-dr_grpo", "scale": float(MAX_LENGTH)} | CLIP),
    "dapo": (BOUNDS, {"agg": "token-mean"} | CLIP),
    # epsilon_high is the bound itself, and there is no lower one
    "cispo": (
        {"epsilon_high": 1.3},
        {"kind": "cispo", "eps_low": 1.0, "eps_high": 0.3, "agg": "token-mean", "ratio_clamp": None},
    ),
    "sapo": (
        {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        {"kind": "sapo", "tau_pos": 1.0, "tau_neg": TAU_NEG, "agg": "trl-grpo", "ratio_clamp": None},
    ),
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
each_loss = pytest.mark.parametrize("name", LOSSES)
each_clipped = pytest.mark.parametrize("name", CLIPPED)


def our_loss(api, batch, name, *, packed=False, tensors=None, **options):
    return ours(
        api.policy_loss, batch, ("old_logp", "advantages"), packed=packed, tensors=tensors, **(LOSSES[name][1] | options)
    )


@each_loss
@packed_or_not
@each_dtype
@each_seed
def test_losses(api, grpo, name, dtype, packed, seed):
    """An empty completion counts in the means over completions of TRL."""
    batch = make(seed, dtype)
    expected = grpo.loss(batch, loss_type=name, **LOSSES[name][0])
    same(our_loss(api, batch, name, packed=packed), expected, dtype)


@each_loss
def test_losses_of_a_part_of_the_batch(api, grpo, name):
    """In gradient accumulation: dapo and cispo divide by the tokens of the whole batch, the others by the steps."""
    batch = make(3)
    steps, generations, tokens = 2, 4, torch.tensor(171)
    expected = grpo.loss(
        batch, inputs=grpo.inputs(batch, num_items_in_batch=tokens), loss_type=name, **LOSSES[name][0],
        current_gradient_accumulation_steps=steps, steps_per_generation=generations,
    )  # fmt: skip
    if name in ("dapo", "cispo"):
        mine = our_loss(api, batch, name, norm=tokens * steps / generations)
    else:
        mine = [x / steps for x in our_loss(api, batch, name)[:2]]
    same(mine, expected)


@each_clipped
@pytest.mark.parametrize("delta", [1.1, 1.35])
@each_dtype
def test_two_sided_clipping(api, grpo, name, delta, dtype):
    batch = make(4, dtype)
    expected = grpo.loss(batch, loss_type=name, delta=delta, **LOSSES[name][0])
    mine = our_loss(api, batch, name, delta=delta)
    same(mine, expected, dtype)
    assert mine[0] != our_loss(api, batch, name)[0]


@each_clipped
@pytest.mark.parametrize("delta", [None, 1.02])
@packed_or_not
@each_dtype
@each_seed
def test_sequence_level_importance_sampling(api, grpo, name, delta, dtype, packed, seed):
    batch = make(seed, dtype, spread=0.2)
    bounds = {"epsilon_low": 0.01, "epsilon_high": 0.015}
    expected = grpo.loss(batch, loss_type=name, importance_sampling_level="sequence", delta=delta, **bounds)
    mine = our_loss(api, batch, name, packed=packed, kind="gspo", eps_low=0.01, eps_high=0.015, delta=delta)
    same(mine, expected, dtype)


@pytest.mark.parametrize("corrected", [False, True])
@each_loss
@packed_or_not
@each_dtype
def test_kl(api, grpo, name, corrected, packed, dtype):
    batch = make(5, dtype)
    expected = grpo.loss(batch, loss_type=name, beta=0.3, use_bias_correction_kl=corrected, **LOSSES[name][0])
    mine = our_loss(api, batch, name, packed=packed, tensors={"ref_logp": "ref_logp"}, beta=0.3, kl_ratio=corrected)
    same(mine, expected, dtype)
    if not corrected:
        assert mine[2]["kl"].item() == pytest.approx(expected[2]["kl"], rel=1e-5)


@pytest.mark.parametrize("corrected", [False, True])
@each_clipped
def test_kl_with_sequence_level_importance_sampling(api, grpo, name, corrected):
    batch = make(6, spread=0.2)
    expected = grpo.loss(
        batch, loss_type=name, importance_sampling_level="sequence", beta=0.3, use_bias_correction_kl=corrected,
        epsilon_low=0.01, epsilon_high=0.015,
    )  # fmt: skip
    mine = our_loss(
        api, batch, name, kind="gspo", eps_low=0.01, eps_high=0.015, tensors={"ref_logp": "ref_logp"}, beta=0.3,
        kl_ratio=corrected,
    )  # fmt: skip
    same(mine, expected)


@each_loss
def test_on_policy(api, grpo, name):
    """Without old log-probabilities TRL takes those of the model itself."""
    batch = make(7)
    inputs = grpo.inputs(batch)
    del inputs["old_per_token_logps"]
    expected = grpo.loss(batch, inputs=inputs, loss_type=name, **LOSSES[name][0])
    mine = ours(api.policy_loss, batch, ("logp", "advantages"), **LOSSES[name][1])
    same(mine, expected)


@each_seed
@each_dtype
def test_luspo(api, grpo, dtype, seed):
    """Sequence-level losses, summed over the tokens of a sequence: not a kind of ours, but an aggregation."""
    batch = make(seed, dtype, spread=0.2)
    expected = grpo.loss(batch, loss_type="luspo", importance_sampling_level="sequence", epsilon_low=0.01, epsilon_high=0.015)
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), kind="gspo", eps_low=0.01, eps_high=0.015, ratio_clamp=None,
        agg="seq-mean-token-sum", norm=float(len(batch.lengths)),
    )  # fmt: skip
    # TRL broadcasts a sequence's loss to its tokens and masks, so that an empty one adds nothing
    same(mine, expected, dtype)


@each_seed
def test_vespo(api, grpo, seed):
    """REINFORCE with TRL's weight per sequence."""
    batch = make(seed)
    expected = grpo.loss(batch, loss_type="vespo")
    weight = grpo.trainer.get_gamma_weights(
        advantages=batch.advantages[:, None], log_ratio_per_token=batch.logp - batch.old_logp, mask=batch.mask.long(),
        importance_sampling_ratio=None,
    )[:, 0]  # fmt: skip
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), tensors={"token_weight": weight}, kind="reinforce", agg="token-mean"
    )
    same(mine, expected)


@each_seed
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gmpo(api, grpo, seed, beta):
    """TRL divides by the number of tokens, verl and ours by that plus 1e-8; only this much apart. An empty completion has
    the loss -A in TRL, though no gradient, and 0 in verl and here."""
    from trl.experimental.gmpo import GMPOTrainer

    batch = make(seed)
    of_empty = batch.advantages.masked_fill(batch.mask.any(1), 0.0).mean()
    assert of_empty != 0
    expected = grpo.loss(
        batch, method=lambda model, inputs: GMPOTrainer._compute_loss(grpo.trainer, model, inputs), beta=beta,
        epsilon_low=0.2, epsilon_high=0.28,
    )  # fmt: skip
    mine = ours(
        api.policy_loss, batch, ("old_logp", "advantages"), tensors={"ref_logp": "ref_logp"}, kind="gmpo", agg="trl-grpo",
        beta=beta, **CLIP,
    )  # fmt: skip
    assert_close(mine[0] - of_empty, expected[0], rtol=1e-8, atol=1e-8)
    assert_close(mine[1], expected[1], rtol=1e-8, atol=1e-8)


@each_clipped
def test_clip_metrics(api, grpo, name):
    batch = make(8)
    expected = grpo.loss(batch, loss_type=name, **LOSSES[name][0])[2]
    mine = our_loss(api, batch, name, tensors={"entropy": "entropy"})[2]
    assert expected["clip_ratio/low_mean"] > 0
    assert expected["clip_ratio/high_mean"] > 0
    assert mine["clip_fraction_low"].item() == pytest.approx(expected["clip_ratio/low_mean"], rel=1e-6)
    assert mine["clip_fraction_high"].item() == pytest.approx(expected["clip_ratio/high_mean"], rel=1e-6)
    assert mine["entropy"].item() == pytest.approx(expected["entropy"], rel=1e-5)


@each_loss
def test_nan_outside_the_mask_stays_outside_here_and_leaks_in_trl(api, grpo, name):
    batch = make(9)
    finite = grpo.loss(batch, loss_type=name, **LOSSES[name][0])
    leaked = grpo.loss(batch.nan_outside(), loss_type=name, **LOSSES[name][0])
    assert leaked[0].isnan()
    same(our_loss(api, batch, name), finite)  # `ours` hides what is outside behind NaN


@each_clipped
def test_log_ratios_are_bounded_here_unless_asked_not_to_and_never_in_trl(api, grpo, name):
    batch = make(10, spread=12.0)
    worst = (batch.logp - batch.old_logp)[batch.mask & (batch.advantages < 0)[:, None]].max()
    assert worst > 20
    expected = grpo.loss(batch, loss_type=name, **LOSSES[name][0])
    same(our_loss(api, batch, name), expected)
    assert our_loss(api, batch, name, ratio_clamp=20.0)[0] < expected[0] / 2


def test_an_empty_batch_is_zero_in_both(api, grpo):
    batch = make(0)
    batch.mask = torch.zeros_like(batch.mask)
    for name, (settings, options) in LOSSES.items():
        theirs = grpo.loss(batch, loss_type=name, **settings)
        mine = ours(api.policy_loss, batch, ("old_logp", "advantages"), **options)
        assert theirs[0] == mine[0] == 0
        assert (mine[1] == 0).all()


# --------------------------------------------------------------------------------------------------- masks and weights


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@each_seed
def test_high_entropy_tokens(api, grpo, quantile, seed):
    """TRL takes the quantile in float32."""
    batch = make(seed, F32, shape=(9, 31))
    theirs = grpo.trainer.get_high_entropy_mask(batch.entropy, batch.mask, 1 - quantile)
    mine = api.top_quantile_mask(batch.nan_outside().entropy, batch.mask, fraction=quantile, rule="trl")
    assert 0 < theirs.sum() < batch.mask.sum()
    assert torch.equal(mine, theirs)


def test_high_entropy_tokens_of_any_count(api, grpo):
    """Also where the quantile falls on a token, or on several with the same entropy."""
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for n in range(1, 64):
        for levels in (3, 1000):
            entropy = torch.randint(levels, (1, n), generator=generator) / 8
            mask = torch.ones(1, n, dtype=torch.bool)
            theirs = grpo.trainer.get_high_entropy_mask(entropy, mask, 1 - 0.2)
            if not torch.equal(api.top_quantile_mask(entropy, mask, fraction=0.2, rule="trl"), theirs):
                wrong.append((n, levels))
    assert wrong == []


@each_loss
@each_dtype
def test_losses_of_high_entropy_tokens(api, grpo, name, dtype):
    """The mask is on the policy term, not on the penalty."""
    batch = make(11, dtype)
    expected = grpo.loss(
        batch, loss_type=name, top_entropy_quantile=0.4, beta=0.2, use_bias_correction_kl=False, **LOSSES[name][0]
    )
    mask = api.top_quantile_mask(batch.nan_outside().entropy.float(), batch.mask, fraction=0.4, rule="trl")
    mine = our_loss(api, batch, name, tensors={"ref_logp": "ref_logp", "token_weight": mask.to(dtype)}, beta=0.2)
    same(mine, expected, dtype)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
@packed_or_not
@each_seed
def test_off_policy_mask(api, grpo, threshold, packed, seed):
    batch = make(seed)
    theirs = grpo.trainer.get_off_policy_mask(
        batch.advantages[:, None], batch.logp, batch.rollout_logp, batch.mask.long(), threshold
    )[:, 0].bool()  # fmt: skip
    hidden, inside = batch.nan_outside(), torch.arange(batch.mask.shape[1]) < batch.lengths[:, None]
    arguments, options = [hidden.logp, hidden.rollout_logp, batch.mask], {}
    if packed:
        arguments = [t[inside] for t in arguments]
        options["cu_seqlens"] = torch.cat([torch.zeros(1), batch.lengths.cumsum(0)]).to(torch.int32)
    assert torch.equal(api.off_policy_mask(batch.advantages, *arguments, threshold=threshold, **options), theirs)


def test_tokens_that_the_engine_could_not_score(api, grpo):
    """NaN inside the mask: no mismatch of that token, in both."""
    batch = make(1)
    rollout = torch.where(batch.mask & (torch.arange(13) % 3 == 0), torch.nan, batch.rollout_logp - 2)
    for shift in (0.0, 4.0):
        theirs = grpo.trainer.get_off_policy_mask(
            batch.advantages[:, None], batch.logp, rollout + shift, batch.mask.long(), 0.5
        )[:, 0].bool()  # fmt: skip
        mine = api.off_policy_mask(batch.advantages, batch.logp, rollout + shift, batch.mask, threshold=0.5)
        assert torch.equal(mine, theirs)


@each_clipped
def test_losses_with_off_policy_mask(api, grpo, name):
    batch = make(12)
    inputs = grpo.inputs(batch, sampling_per_token_logps=batch.rollout_logp)
    expected = grpo.loss(
        batch, inputs=inputs, loss_type=name, off_policy_mask_threshold=0.02, beta=0.2, use_bias_correction_kl=False,
        **LOSSES[name][0],
    )  # fmt: skip
    keep = api.off_policy_mask(batch.advantages, batch.logp, batch.rollout_logp, batch.mask, threshold=0.02)
    assert 0 < keep.sum() < len(keep)
    mine = our_loss(api, batch, name, tensors={"ref_logp": "ref_logp", "token_weight": keep.to(F64)}, beta=0.2)
    same(mine, expected)


MODES = {
    "token_truncate": {"level": "token", "mode": "truncate"},
    "token_mask": {"level": "token", "mode": "mask"},
    "sequence_truncate": {"level": "sequence", "mode": "truncate"},
    "sequence_mask": {"level": "sequence", "mode": "mask"},
}
each_mode = pytest.mark.parametrize("mode", MODES)


def rolled_out(grpo, batch, mode, low=None, high=3.0, **settings):
    """(what TRL made of the rollout, its weights spread over tokens)"""
    rows = len(batch.lengths) // GROUP * GROUP
    assert rows == len(batch.lengths)
    out = grpo.rollout(
        torch.arange(rows, dtype=F64)[:, None], logp=batch.old_logp, ref_logp=batch.ref_logp, sampling=batch.rollout_logp,
        lengths=batch.lengths, mask=batch.mask, use_vllm=True, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high,
        **settings,
    )  # fmt: skip
    return out, out["importance_sampling_ratio"].expand_as(batch.mask)


def rollouts(seed, dtype=F64, spread=0.3):
    """TRL has no empty completions: the empty row is one that is masked as a whole."""
    batch = make(seed, dtype, shape=(2 * GROUP, 13), spread=spread)
    batch.lengths = batch.lengths.clamp_min(1)
    return batch


def our_weights(api, batch, mode, low=None, high=3.0, **options):
    hidden = batch.nan_outside()
    return api.importance_weights(
        hidden.old_logp, hidden.rollout_logp, batch.mask, clip_min=low, clip_max=high, **MODES[mode], **options
    )


@each_mode
@pytest.mark.parametrize(("low", "high"), [(None, 1.2), (0.8, 1.3), (0.9, None)])
@each_dtype
@each_seed
def test_rollout_weights(api, grpo, mode, low, high, dtype, seed):
    """What is outside the mask has weight 0 here and 1 (or the bound) in TRL, where the loss is masked anyway."""
    batch = rollouts(seed, dtype, spread=0.1)
    _, expected = rolled_out(grpo, batch, mode, low, high)
    mine = our_weights(api, batch, mode, low, high)
    assert len(mine[batch.mask].unique()) > 2
    close(mine, expected * batch.mask, dtype)
    assert (expected[~batch.mask] != 0).any()


@each_mode
def test_rollout_weights_far_away(api, grpo, mode):
    """Log-ratios are clamped to +-20 here unless asked not to, and never in TRL."""
    batch = rollouts(4, spread=20.0)
    batch.rollout_logp = batch.rollout_logp.float().to(F64)  # TRL's, whatever the type of the rest
    _, expected = rolled_out(grpo, batch, mode, None, math.inf)
    assert_close(our_weights(api, batch, mode, high=None, log_clamp=None), expected * batch.mask, rtol=1e-9, atol=0)
    assert expected[batch.mask].log().abs().max() > 20
    clamped = our_weights(api, batch, mode, high=None)[batch.mask]
    assert clamped.max().item() == pytest.approx(math.exp(20))


@each_mode
def test_rollout_weights_of_tokens_that_the_engine_could_not_score(api, grpo, mode):
    """TRL gives such a token no mismatch; NaN inside the mask is NaN here, so replace it, as TRL does."""
    batch = rollouts(5)
    unscored = batch.mask & (torch.arange(13) % 4 == 1)
    assert unscored.any()
    rollout = batch.rollout_logp
    batch.rollout_logp = torch.where(unscored, torch.nan, rollout)
    _, expected = rolled_out(grpo, batch, mode)
    assert our_weights(api, batch, mode)[unscored].isnan().all()
    batch.rollout_logp = torch.where(unscored, batch.old_logp, rollout)
    close(our_weights(api, batch, mode), expected * batch.mask)


@each_mode
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo", "sapo"])
def test_from_rollout_to_loss(api, grpo, name, mode):
    """Rewards to advantages, weights and loss, from what TRL's rollout step hands to its loss. TRL's default is kl_ratio."""
    batch = rollouts(6)
    out, _ = rolled_out(grpo, batch, mode, 0.8, 1.3, beta=0.1)
    out["tool_mask"] = batch.mask.long()
    expected = grpo.loss(batch, inputs=out, loss_type=name, **LOSSES[name][0])
    rewards, group = torch.arange(2 * GROUP, dtype=F64), torch.arange(2 * GROUP) // GROUP
    batch.advantages = api.group_advantages(rewards, group, eps=EPS).advantages
    weights = our_weights(api, batch, mode, 0.8, 1.3)
    mine = our_loss(api, batch, name, tensors={"token_weight": weights, "ref_logp": "ref_logp"}, beta=0.1, kl_ratio=True)
    same(mine, expected)


# ----------------------------------------------------------------------------------------------------------- advantages


def rewards_of(seed, dtype, kinds, holes=False, groups=13):
    """[B, K], multiples of 2^-10; with holes: NaN, among them a row of NaN and a column with one number in a group."""
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.randn(groups * GROUP, kinds, generator=generator) * 2**10).round().div(2**10).to(dtype)
    rewards[:GROUP, 0] = 1.0
    rewards[GROUP : 2 * GROUP] = (rewards[GROUP : 2 * GROUP] > 0).to(dtype)
    if holes:
        rewards[torch.rand(rewards.shape, generator=generator) < 0.15] = torch.nan
        rewards[9] = torch.nan
        rewards[11:15, -1] = torch.nan
    return rewards, torch.arange(groups * GROUP) // GROUP


def close_rated(actual, expected, dtype, holes):
    """With holes TRL's counts are any, and its float32 shows."""
    if holes and dtype == F64:
        assert_close(actual, expected, rtol=1e-7, atol=1e-7)
    else:
        close(actual, expected, dtype)


WEIGHTS = {1: [1.0], 3: [1.0, 0.5, -0.25]}
SCALES = {
    "group": {"estimator": "grpo", "eps": EPS},
    "batch": {"estimator": "dr_grpo", "batch": "std", "batch_eps": EPS},
    "none": {"estimator": "dr_grpo"},
}


@pytest.mark.parametrize("holes", [False, True], ids=["", "nan"])
@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("scale", SCALES)
@each_dtype
@each_seed
def test_advantages(api, grpo, scale, kinds, holes, dtype, seed):
    rewards, group = rewards_of(seed, dtype, kinds, holes)
    weights = torch.tensor(WEIGHTS[kinds], dtype=dtype)
    expected = grpo.rollout(
        rewards, weights=weights, scale_rewards=scale, multi_objective_aggregation="sum_then_normalize"
    )["advantages"]  # fmt: skip
    options = {"nan": "ignore"} if holes else {}
    mine = api.group_advantages(rewards, group, weights=WEIGHTS[kinds], **SCALES[scale], **options).advantages
    close_rated(mine, expected, dtype, holes)
    assert (mine[:GROUP] == 0).all() or kinds > 1


@pytest.mark.parametrize("holes", [False, True], ids=["", "nan"])
@pytest.mark.parametrize("kinds", [1, 3])
@each_dtype
@each_seed
def test_advantages_of_several_rewards(api, grpo, kinds, holes, dtype, seed):
    """normalize_then_sum (GDPO): with one reward too, the batch stage is applied."""
    rewards, group = rewards_of(seed, dtype, kinds, holes)
    weights = torch.tensor(WEIGHTS[kinds], dtype=dtype)
    expected = grpo.rollout(
        rewards, weights=weights, multi_objective_aggregation="normalize_then_sum"
    )["advantages"]  # fmt: skip
    options = {"nan": "ignore"} if holes else {}
    mine = api.group_advantages(
        rewards, group, eps=EPS, weights=WEIGHTS[kinds], combine="normalize_then_sum", batch="seq", batch_eps=EPS, **options
    ).advantages
    close_rated(mine, expected, dtype, holes)


def test_a_row_without_any_reward_has_no_advantage(api, grpo):
    rewards, group = rewards_of(0, F64, 3, holes=True)
    for options, aggregation in (
        ({}, "sum_then_normalize"),
        ({"combine": "normalize_then_sum", "batch": "seq"}, "normalize_then_sum"),
    ):
        theirs = grpo.rollout(rewards, multi_objective_aggregation=aggregation)["advantages"]
        mine = api.group_advantages(rewards, group, eps=EPS, nan="ignore", **options).advantages
        assert theirs[9] == mine[9] == 0
    with pytest.raises(ValueError, match="rewards"):
        api.group_advantages(rewards, group)


def test_equal_rewards_give_exactly_zero_here_and_rounding_over_eps_in_trl(api, grpo):
    rewards, group = torch.full((24, 1), 0.7), torch.arange(24) // 12
    theirs = grpo.rollout(rewards, num_generations=12, multi_objective_aggregation="sum_then_normalize")["advantages"]
    assert theirs.abs().min() > 1e-4
    assert (api.group_advantages(rewards, group, eps=EPS).advantages == 0).all()


def test_a_group_of_one_is_zero_in_both(api, grpo):
    rewards = torch.tensor([[1.0], [2.0], [5.0], [0.0]])
    theirs = grpo.rollout(rewards, num_generations=1, scale_rewards="group", multi_objective_aggregation="sum_then_normalize")
    assert (theirs["advantages"] == 0).all()
    assert (api.group_advantages(rewards, torch.arange(4), eps=EPS).advantages == 0).all()


# ----------------------------------------------------------------------------------------------------------------- RLOO


@pytest.mark.parametrize("holes", [False, True], ids=["", "nan"])
@pytest.mark.parametrize("kinds", [1, 3])
@each_dtype
@each_seed
def test_rloo_advantages(api, rloo, kinds, holes, dtype, seed):
    rewards, group = rewards_of(seed, dtype, kinds, holes)
    weights = torch.tensor(WEIGHTS[kinds], dtype=dtype)
    expected = rloo.rollout(
        rewards, weights=weights, beta=0.0, normalize_advantages=False
    )["advantages"]  # fmt: skip
    options = {"nan": "ignore"} if holes else {}
    mine = api.group_advantages(rewards, group, estimator="rloo", weights=WEIGHTS[kinds], **options).advantages
    close(mine, expected, dtype)


@each_dtype
@each_seed
def test_rloo_normalizes_over_the_batch(api, rloo, dtype, seed):
    rewards, group = rewards_of(seed, dtype, 1)
    expected = rloo.rollout(rewards, beta=0.0, normalize_advantages=True)["advantages"]
    mine = api.group_advantages(rewards[:, 0], group, estimator="rloo", batch="seq", batch_eps=EPS).advantages
    close(mine, expected, dtype)
    plain = api.group_advantages(rewards[:, 0], group, estimator="rloo").advantages
    close(api.batch_normalize(plain, api.batch_moments(plain), mode="seq", eps=EPS), expected, dtype)


@each_dtype
@each_seed
def test_rloo_puts_the_penalty_into_the_reward(api, rloo, dtype, seed):
    """The sum over the completion of k1, not a part of the loss."""
    batch = rollouts(seed, dtype)
    batch.mask = torch.arange(13) < batch.lengths[:, None]  # RLOOTrainer has no tool mask
    rewards = torch.linspace(-1, 1, 2 * GROUP, dtype=dtype)
    out = rloo.rollout(
        rewards[:, None], logp=batch.old_logp, ref_logp=batch.ref_logp, lengths=batch.lengths, beta=0.3,
        normalize_advantages=False,
    )  # fmt: skip
    hidden = batch.nan_outside()
    penalty = api.sequence_sum(hidden.old_logp, batch.mask, minus=hidden.ref_logp)
    mine = api.group_advantages(rewards - 0.3 * penalty, torch.arange(2 * GROUP) // GROUP, estimator="rloo").advantages
    close(mine, out["advantages"], dtype)
    close(api.sequence_sum(hidden.old_logp, batch.mask), out["old_logps"], dtype)


@each_dtype
@each_seed
def test_rloo_loss(api, rloo, dtype, seed):
    """A clipped loss of sequences, with the ratio of whole sequences, not of their mean: each is one token of ours."""
    batch = make(seed, dtype, spread=0.1)
    batch.mask = torch.arange(13) < batch.lengths[:, None]
    old = (batch.old_logp * batch.mask).sum(1)
    inputs = {name: value for name, value in rloo.inputs(batch).items() if name.startswith(("prompt", "completion"))}
    expected = rloo.loss(batch, inputs=inputs | {"advantages": batch.advantages, "old_logps": old}, **BOUNDS)
    hidden = batch.nan_outside()

    def loss(leaf):
        sums = [api.sequence_sum(t, batch.mask)[:, None] for t in (leaf, hidden.old_logp)]
        return api.policy_loss(*sums, batch.advantages, agg="seq-mean-token-sum", **CLIP)

    mine = value_and_gradient(loss, hidden.logp)
    same(mine, expected, dtype)
    assert mine[2]["clip_fraction_low"].item() == pytest.approx(expected[2]["clip_ratio/low_mean"])
    assert mine[2]["clip_fraction_high"].item() == pytest.approx(expected[2]["clip_ratio/high_mean"])


def test_trl_takes_what_this_file_hands_to_it():
    """Signatures that a new release may change."""
    names_of = [
        list(inspect.signature(method).parameters)
        for method in (trl.GRPOTrainer.get_off_policy_mask, trl.GRPOTrainer.get_high_entropy_mask)
    ]
    assert names_of == [
        ["advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold"],
        ["self", "entropies", "mask", "threshold"],
    ]
