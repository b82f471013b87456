"""Ours against the installed TRL, losses of pairs: its trainers' own methods, on prepared log-probabilities."""

import inspect
import math
from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import prefkern
from parity.batches import DTYPES, F32, F64, close, names, same, value_and_gradient
from parity.pairs import make_pairs, our_pairs, response_sums
from prefkern.papers import Pairs, load_pair_recipe

trl = pytest.importorskip("trl", minversion="1.16")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from accelerate.state import AcceleratorState  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

each_seed = pytest.mark.parametrize("seed", range(3))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=names)

BETA = 0.1  # of every trainer here, unless said

# -------------------------------------------------------------------------------------------------- trainers on a string

PREFERENCES = {"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e f g"] * 4}
UNPAIRED = {"prompt": ["a b"] * 4, "completion": ["c d"] * 4, "label": [True, False] * 2}


def build(trainer_class, config_class, path, output, columns=PREFERENCES, **options):
    model = path
    if trainer_class is trl.RewardTrainer:
        config = transformers.AutoConfig.from_pretrained(path, num_labels=1)
        model = transformers.LlamaForSequenceClassification(config)
    elif trainer_class in (CPOTrainer, ORPOTrainer):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    args = config_class(
        output_dir=str(output), per_device_train_batch_size=4, bf16=False, report_to="none", use_cpu=True,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(path),
    )
    trainer.model.train()
    return trainer


@contextmanager
def refusal_to_build(error, match):
    """A trainer that gives up half-way leaves accelerate's state, which all trainers share, half-made."""
    saved = dict(AcceleratorState._shared_state)
    with pytest.raises(error, match=match):
        yield
    AcceleratorState._shared_state.clear()
    AcceleratorState._shared_state.update(saved)


@pytest.fixture(scope="module")
def dpo_trainer(model_path, tmp_path_factory):
    return build(trl.DPOTrainer, trl.DPOConfig, model_path, tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def kto_trainer(model_path, tmp_path_factory):
    return build(trl.KTOTrainer, trl.KTOConfig, model_path, tmp_path_factory.mktemp("kto"), UNPAIRED)


@pytest.fixture(scope="module")
def cpo_trainer(model_path, tmp_path_factory):
    return build(CPOTrainer, CPOConfig, model_path, tmp_path_factory.mktemp("cpo"))


@pytest.fixture(scope="module")
def orpo_trainer(model_path, tmp_path_factory):
    return build(ORPOTrainer, ORPOConfig, model_path, tmp_path_factory.mktemp("orpo"))


@pytest.fixture(scope="module")
def reward_trainer(model_path, tmp_path_factory):
    return build(trl.RewardTrainer, trl.RewardConfig, model_path, tmp_path_factory.mktemp("reward"))


class Theirs:
    """A trainer whose models are replaced by given tensors."""

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.monkeypatch = trainer, monkeypatch

    def settings(self, **settings):
        """Attributes of the trainer, or of its arguments; undone after the test."""
        for name, value in settings.items():
            owner = self.trainer if hasattr(self.trainer, name) else self.trainer.args
            assert hasattr(owner, name), f"this TRL has no {name}"
            self.monkeypatch.setattr(owner, name, value)

    @property
    def metrics(self):
        return {name: values[-1] for name, values in self.trainer._metrics["train"].items()}


def fused_output(logp, batch, outputs=True):
    """What a model with TRL's fused head returns: 0 where there is no label."""
    logp = logp.where(batch.mask, 0.0)
    if not outputs:
        return FusedCausalLMOutput(log_probs=logp)
    zeros = torch.zeros_like(batch.logp)
    return FusedCausalLMOutput(
        log_probs=logp, entropy=zeros, log_sum_sq_probs=batch.log_sum_sq_probs, mean_logits=zeros, is_top1=zeros.bool()
    )


def fused_inputs(batch):
    """A token more than the log-probabilities: nothing predicts the first."""

    def whole(mask, first):
        return torch.cat([torch.full((len(mask), 1), first), mask.long()], 1)

    return {
        "input_ids": torch.ones(len(batch.mask), batch.mask.shape[1] + 1, dtype=torch.long),
        "attention_mask": whole(batch.inside, 1),
        "completion_mask": whole(batch.mask, 0),
    }


class DPO(Theirs):
    def loss(self, batch, loss_type="sigmoid", *, weights=None, precomputed=False, **settings):
        """(loss, gradient of every token, metrics)"""
        types = [loss_type] if isinstance(loss_type, str) else loss_type
        self.settings(loss_types=types, loss_weights=weights or [1.0] * len(types), **settings)
        inputs = fused_inputs(batch)
        if precomputed:
            self.settings(precompute_ref_logps=True)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = batch.ref_sums
        else:
            self.settings(ref_model=lambda **kwargs: fused_output(batch.ref_logp, batch, outputs=False))

        def loss(leaf):
            return self.trainer.compute_loss(lambda **kwargs: fused_output(leaf, batch), inputs)

        value, gradient, _ = value_and_gradient(loss, batch.logp)
        return value, gradient, self.metrics


@pytest.fixture
def dpo(dpo_trainer, monkeypatch):
    return DPO(dpo_trainer, monkeypatch)


# ------------------------------------------------------------------------------------------------------------ DPO losses

SMOOTHING = 0.1
ROUNDED = {"label_smoothing": np.float64(SMOOTHING)}  # TRL's exo_pair makes float32 of a Python number, whatever the rest is
LOSSES = {
    "sigmoid": ({}, {}),
    "hinge": ({}, {"kind": "hinge"}),
    "ipo": ({}, {"kind": "ipo", "average": "score"}),
    "exo_pair": (ROUNDED, {"kind": "exo_pair", "label_smoothing": SMOOTHING}),
    "nca_pair": ({}, {"kind": "nca_pair"}),
    "robust": ({"label_smoothing": SMOOTHING}, {"kind": "robust", "label_smoothing": SMOOTHING}),
    "bco_pair": ({}, {"kind": "bco_pair"}),
    "sppo_hard": ({}, {"kind": "sppo_hard"}),
    "apo_zero": ({}, {"kind": "apo_zero"}),
    "apo_down": ({}, {"kind": "apo_down"}),
    "discopop": ({"discopop_tau": 0.05}, {"kind": "discopop", "tau": 0.05}),
    "sigmoid_norm": ({}, {"average": "score"}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def our_loss(api, batch, name, **options):
    options = LOSSES[name][1] | options
    if options.get("average"):
        chosen, rejected = batch.lengths
        options |= {"chosen_lengths": chosen, "rejected_lengths": rejected}
    return our_pairs(lambda *logp: api.preference_loss(*logp, **options), batch)


@each_loss
@each_dtype
@each_seed
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses(api, dpo, name, dtype, seed, beta):
    batch = make_pairs(seed, dtype)
    expected = dpo.loss(batch, name, beta=beta, **LOSSES[name][0])
    same(our_loss(api, batch, name, beta=beta), expected, dtype)


@each_loss
def test_metrics(api, dpo, name):
    """TRL's rewards are of the sums, whatever the loss averages."""
    batch = make_pairs(3)
    expected = dpo.loss(batch, name, **LOSSES[name][0])[2]
    mine = our_loss(api, batch, name, average=None)[2]
    for ours, theirs in {
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
    }.items():
        assert mine[ours].item() == pytest.approx(expected[theirs], rel=1e-6), ours
    assert 0 < expected["rewards/accuracies"] < 1


WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
each_with_divergence = pytest.mark.parametrize("name", WITH_DIVERGENCE)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence"])
@each_with_divergence
@each_dtype
def test_divergences(api, dpo, name, divergence, dtype):
    batch = make_pairs(4, dtype, spread=0.2)
    expected = dpo.loss(batch, name, f_divergence_type=divergence, **LOSSES[name][0])
    same(our_loss(api, batch, name, score=divergence), expected, dtype)


@pytest.mark.parametrize("coefficient", [0.3, 0.5, 0.9])
@each_with_divergence
def test_the_alpha_divergence_is_that_of_1_less_trls_coefficient(api, dpo, name, coefficient):
    batch = make_pairs(5, F32, spread=0.2)
    expected = dpo.loss(
        batch, name, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient, **LOSSES[name][0]
    )
    alpha = 1 - coefficient
    same(our_loss(api, batch, name, score="alpha_divergence", alpha=alpha), expected, F32)
    if coefficient != 0.5:
        other = our_loss(api, batch, name, score="alpha_divergence", alpha=coefficient)
        assert not torch.isclose(other[0], expected[0], rtol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_trl_has_no_divergences_for_other_losses(model_path, tmp_path, divergence):
    for name in [*LOSSES, "aot", "aot_unpaired"]:
        if name not in WITH_DIVERGENCE:
            with refusal_to_build(ValueError, "only supported for the following loss types"):
                build(trl.DPOTrainer, trl.DPOConfig, model_path, tmp_path, loss_type=[name], f_divergence_type=divergence)


def test_the_alpha_divergence_of_trl_knows_no_float64(api, dpo):
    batch = make_pairs(6)
    with pytest.raises(KeyError, match="float64"):
        dpo.loss(batch, f_divergence_type="alpha_divergence")
    single = dpo.loss(make_pairs(6, F32), f_divergence_type="alpha_divergence")
    close(our_loss(api, batch, "sigmoid", score="alpha_divergence", alpha=0.5)[0], single[0], F32)


def far_away(log_ratio, dtype=F32):
    """Of the first pair, both log-ratios."""
    batch = make_pairs(6, dtype, spread=0.2)
    for row in (0, batch.pairs):
        first = batch.mask[row].nonzero()[0]
        shift = log_ratio - (batch.logp - batch.ref_logp)[row][batch.mask[row]].sum()
        batch.ref_logp[row, first] -= shift
    return batch


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_exponents_are_held_at_80_here_and_in_trl_for_alpha_alone(api, dpo, divergence):
    """The pair beyond it has no gradient then; without the bound it is inf - inf."""
    batch = far_away(-200.0)
    mine = our_loss(api, batch, "sigmoid", score=divergence, alpha=0.5)
    theirs = dpo.loss(batch, f_divergence_type=divergence)
    pair = torch.zeros_like(batch.mask)
    pair[[0, batch.pairs]] = True
    assert mine[0].isfinite()
    assert (mine[1][pair] == 0).all()
    if divergence == "forward_kl":
        assert theirs[0].isnan()
    else:
        same(mine, theirs, F32)


# ------------------------------------------------------------------------------------- losses that are put together of ops


def our_aot(api, batch, unpaired, **options):
    """Quantiles against quantiles: what is paired is sorted first."""

    def loss(chosen, rejected, ref_chosen, ref_rejected):
        left, right = chosen - rejected, ref_chosen - ref_rejected
        if unpaired:
            left, right = chosen - ref_chosen, rejected - ref_rejected
        return api.preference_loss(left.sort(stable=True).values, right.sort(stable=True).values, **options)

    return our_pairs(loss, batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@each_dtype
@each_seed
def test_aot(api, dpo, name, smoothing, dtype, seed):
    batch = make_pairs(seed, dtype)
    expected = dpo.loss(batch, name, label_smoothing=smoothing)
    same(our_aot(api, batch, name == "aot_unpaired", label_smoothing=smoothing), expected, dtype)


def test_sigmoid_with_label_smoothing_is_conservative_dpo_here_and_plain_dpo_in_trl(api, dpo):
    """Also of several losses in one, where the number is meant for another. What we compute, TRL calls aot of single pairs."""
    batch = make_pairs(7)
    plain = dpo.loss(batch, "sigmoid")
    assert dpo.loss(batch, "sigmoid", label_smoothing=SMOOTHING)[0] == plain[0]
    same(our_loss(api, batch, "sigmoid"), plain)
    one = make_pairs(7, pairs=1)
    expected = dpo.loss(one, "aot", label_smoothing=SMOOTHING)
    same(our_loss(api, one, "sigmoid", label_smoothing=SMOOTHING), expected)


def ld_weight(mask, alpha):
    """alpha for the tokens of a response beyond the length of the other one."""
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    return torch.where(mask.cumsum(1) > shared[:, None], alpha, 1.0)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "apo_zero", "ipo"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@each_dtype
def test_ld_dpo(api, dpo, name, alpha, dtype):
    batch = make_pairs(8, dtype)
    expected = dpo.loss(batch, name, ld_alpha=alpha)
    weight = ld_weight(batch.mask, torch.tensor(alpha, dtype=F64)).to(dtype)
    scaled = batch.nan_outside().ref_logp * weight
    options = dict(LOSSES[name][1])
    if "average" in options:
        options["chosen_lengths"], options["rejected_lengths"] = batch.lengths

    def loss(leaf):
        refs = response_sums(scaled, batch.mask)
        return api.preference_loss(*response_sums(leaf * weight, batch.mask), *refs, **options).loss

    same(value_and_gradient(loss, batch.nan_outside().logp), expected, dtype)


def wpo_weight(batch):
    """How likely the policy finds the response, against what it would expect of its own: of both, with no gradient."""
    aligned = response_sums(batch.logp - batch.log_sum_sq_probs, batch.mask)
    return math.prod(torch.exp(a / n) for a, n in zip(aligned, batch.lengths, strict=True))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "hinge"])
@each_dtype
def test_wpo(api, dpo, name, dtype):
    """The product of weights is not held below 1, as it was in the paper's code and in TRL before 1.0."""
    batch = make_pairs(9, dtype)
    weight = wpo_weight(batch)
    assert weight.min() < 1 < weight.max()
    expected = dpo.loss(batch, name, use_weighting=True, **LOSSES[name][0])
    same(our_loss(api, batch, name, weight=weight), expected, dtype)
    assert our_loss(api, batch, name, weight=weight.clamp(max=1))[0] < expected[0] or name == "robust"


def test_trl_weights_neither_aot_nor_sft_nor_hinge(api, dpo, model_path, tmp_path):
    """The last two since it multiplies in place, which autograd does not let it do."""
    for name in ("aot", "aot_unpaired"):
        with refusal_to_build(NotImplementedError, "WPO-style weighting"):
            build(trl.DPOTrainer, trl.DPOConfig, model_path, tmp_path, loss_type=[name], use_weighting=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        dpo.loss(make_pairs(0), "sft", use_weighting=True)
    batch = make_pairs(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dpo.loss(batch, "hinge", use_weighting=True)
    with torch.no_grad():
        dpo.settings(ref_model=lambda **kwargs: fused_output(batch.ref_logp, batch, outputs=False))
        value = dpo.trainer.compute_loss(lambda **kwargs: fused_output(batch.logp, batch), fused_inputs(batch))
    close(our_loss(api, batch, "hinge", weight=wpo_weight(batch))[0], value)


@each_dtype
@each_seed
def test_sft(api, dpo, dtype, seed):
    batch = make_pairs(seed, dtype)
    chosen = batch.mask.clone()
    chosen[batch.pairs :] = False
    mine = value_and_gradient(lambda leaf: -api.masked_aggregate(leaf, chosen, agg="token-mean"), batch.nan_outside().logp)
    same(mine, dpo.loss(batch, "sft"), dtype)


@each_dtype
def test_a_sum_of_losses(api, dpo, dtype):
    """MPO's: a weighted sum, and "sft" is the RPO term."""
    batch = make_pairs(10, dtype)
    types, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    expected = dpo.loss(batch, types, weights=weights)
    parts = [our_loss(api, batch, name) for name in types[:2]]
    chosen = batch.mask.clone()
    chosen[batch.pairs :] = False
    parts.append(value_and_gradient(lambda leaf: -api.masked_aggregate(leaf, chosen, agg="token-mean"), batch.logp))
    mine = [sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in (0, 1)]
    same(mine, expected, dtype)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_reference_sums_that_were_computed_before(api, dpo, name):
    batch = make_pairs(11)
    expected = dpo.loss(batch, name, precomputed=True)
    same(our_loss(api, batch, name), expected)


# ------------------------------------------------------------------------------------------------- edges, where they differ


def test_ipo_divides_each_side_by_its_own_length_in_trl_and_here_if_asked(api, dpo):
    batch = make_pairs(12)
    expected = dpo.loss(batch, "ipo")
    same(our_loss(api, batch, "ipo"), expected)
    assert our_loss(api, batch, "ipo", average=None)[0] > 1.05 * expected[0]


def test_both_refuse_exo_without_label_smoothing(model_path, tmp_path):
    with refusal_to_build(ValueError, "Label smoothing must be greater than 0"):
        build(trl.DPOTrainer, trl.DPOConfig, model_path, tmp_path, loss_type=["exo_pair"])
    with pytest.raises(ValueError, match="label_smoothing"):
        our_loss(prefkern, make_pairs(0), "exo_pair", label_smoothing=0.0)


def test_discopop_far_below_the_margin_is_0_here_and_nan_in_trl(api, dpo):
    """e^-z overflows, though its share of the loss vanishes."""
    batch = make_pairs(13, F32)
    batch.ref_logp[0, batch.mask[0].nonzero()[0]] += 2000.0
    theirs = dpo.loss(batch, "discopop")
    mine = our_loss(api, batch, "discopop")
    exact = our_loss(api, in_float64(batch), "discopop")
    assert theirs[0].isnan()
    same(mine, exact, F32)


def in_float64(batch):
    return replace(batch, **{f.name: t.double() for f in fields(batch) if (t := getattr(batch, f.name)).is_floating_point()})


@each_loss
def test_nan_outside_the_responses_stays_outside(api, dpo, name):
    """TRL's head fills what has no label with 0 itself."""
    batch = make_pairs(14)
    same(our_loss(api, batch, name), dpo.loss(batch.nan_outside(), name, **LOSSES[name][0]))


def test_unknown_losses(dpo, api):
    with pytest.raises(ValueError, match="Unknown loss type"):
        dpo.loss(make_pairs(0), "nothing")
    with pytest.raises(ValueError, match="nothing"):
        our_pairs(lambda *logp: api.preference_loss(*logp, kind="nothing"), make_pairs(0))


# -------------------------------------------------------------------------------------------------------------------- KTO


class KTO(Theirs):
    WIDTH = 4  # of the sequences that the KL term is estimated from

    def loss(self, batch, label, kl_logp, ref_kl_logp, loss_type="kto", **settings):
        """(loss, gradient of every token, metrics) of single responses, with the sums [N] of the mismatched ones."""
        self.settings(loss_type=loss_type, calculate_KL=loss_type != "apo_zero_unpaired", **settings)
        shape = (len(label), self.WIDTH)
        inputs = fused_inputs(batch) | {
            "label": label,
            "KL_input_ids": torch.ones(shape, dtype=torch.long),
            "KL_attention_mask": torch.ones(shape, dtype=torch.long),
            "KL_completion_mask": torch.ones(shape, dtype=torch.long),
        }

        def model(logp, kl, outputs):
            def forward(input_ids, **kwargs):
                if input_ids.shape == shape:
                    return FusedCausalLMOutput(log_probs=torch.nn.functional.pad(kl[:, None], (0, self.WIDTH - 2)))
                return fused_output(logp, batch, outputs)

            return forward

        self.settings(ref_model=model(batch.ref_logp, ref_kl_logp, outputs=False))
        value, gradient, _ = value_and_gradient(
            lambda leaf: self.trainer.compute_loss(model(leaf, kl_logp, outputs=True), inputs), batch.logp
        )
        return value, gradient, self.metrics


@pytest.fixture
def kto(kto_trainer, monkeypatch):
    return KTO(kto_trainer, monkeypatch)


def judged(seed, dtype=F64, kl=0.5):
    """Responses, half of them desirable or so, and mismatched ones with this mean log-ratio."""
    batch = make_pairs(seed, dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    label = torch.rand(len(batch.mask), generator=generator) < 0.5
    label[:2] = torch.tensor([True, False])
    ref_kl_logp = -torch.randint(2**10, (len(label),), generator=generator).to(dtype) / 2**8
    ratios = torch.randint(-(2**10), 2**10, (len(label),), generator=generator).to(dtype) / 2**9
    return batch, label, ref_kl_logp + (ratios - ratios.mean() + kl), ref_kl_logp


def our_unpaired(api, batch, label, **options):
    hidden = batch.nan_outside()

    def loss(leaf):
        out = api.unpaired_loss(
            leaf.where(batch.mask, 0.0).sum(1), hidden.ref_logp.where(batch.mask, 0.0).sum(1), label, **options
        )
        return out.loss, out.metrics

    return value_and_gradient(loss, hidden.logp)


WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.33}


@pytest.mark.parametrize("kl", [0.5, -0.5])
@each_dtype
@each_seed
def test_kto(api, kto, dtype, seed, kl):
    """The KL term is the mean log-ratio of mismatched responses, and no less than 0."""
    batch, label, kl_logp, ref_kl_logp = judged(seed, dtype, kl)
    expected = kto.loss(batch, label, kl_logp, ref_kl_logp, beta=0.3, **WEIGHTS)
    assert expected[2]["kl"] == pytest.approx(max(kl, 0.0), abs=1e-6)
    mine = our_unpaired(api, batch, label, beta=0.3, kl=(kl_logp - ref_kl_logp).mean(), **WEIGHTS)
    same(mine, expected, dtype)


@each_dtype
@each_seed
def test_apo_zero_unpaired(api, kto, dtype, seed):
    batch, label, *kl = judged(seed, dtype)
    expected = kto.loss(batch, label, *kl, loss_type="apo_zero_unpaired", beta=0.3, **WEIGHTS)
    same(our_unpaired(api, batch, label, kind="apo_zero", beta=0.3, **WEIGHTS), expected, dtype)


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_with_responses_of_one_kind(api, kto, desirable):
    batch, label, *kl = judged(4)
    label = torch.full_like(label, desirable)
    expected = kto.loss(batch, label, *kl, **WEIGHTS)
    same(our_unpaired(api, batch, label, beta=BETA, kl=(kl[0] - kl[1]).mean(), **WEIGHTS), expected)


def test_kto_metrics(api, kto):
    batch, label, *kl = judged(5)
    expected = kto.loss(batch, label, *kl)[2]
    mine = our_unpaired(api, batch, label, beta=BETA, kl=(kl[0] - kl[1]).mean())[2]
    assert mine["chosen_reward"].item() == pytest.approx(expected["rewards/chosen"], rel=1e-6)
    assert mine["rejected_reward"].item() == pytest.approx(expected["rewards/rejected"], rel=1e-6)


def test_kto_of_a_nan_is_nan_here_or_refused_and_left_out_in_trl(api, kto, validation):
    """TRL's nanmean divides by one response less, and its gradient is NaN all the same."""
    batch, label, *kl = judged(6)
    finite = kto.loss(batch, label, *kl)
    batch.logp[3, batch.mask[3].nonzero()[0]] = float("nan")
    theirs = kto.loss(batch, label, *kl)
    assert theirs[0].isfinite()
    assert theirs[0] != finite[0]
    assert theirs[1][3][batch.mask[3]].isnan().all()
    mean = (kl[0] - kl[1]).mean()
    assert our_unpaired(api, batch, label, beta=BETA, kl=mean)[0].isnan()
    validation(True)
    with pytest.raises(ValueError, match="logp"):
        our_unpaired(prefkern, batch, label, beta=BETA, kl=mean)


def test_trl_mismatches_by_rotating_completions(kto_trainer):
    """Within the per-device batch, so that the KL term depends on its size and its order."""
    rows = kto_trainer.train_dataset
    ids = list(rows["completion_ids"])
    assert list(rows["KL_completion_ids"]) == [ids[-1], *ids[:-1]]


# ------------------------------------------------------------------------------------------------- CPO, SimPO, ORPO, TPO

VOCABULARY = 11


def make_logits(batch, seed):
    """Logits [B, T + 1, V] and tokens [B, T + 1]: one position more than there are log-probabilities."""
    generator = torch.Generator().manual_seed(seed + 200)
    shape = (len(batch.mask), batch.mask.shape[1] + 1)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    return torch.randn(*shape, VOCABULARY, generator=generator, dtype=F64).to(batch.logp.dtype), tokens


class WithLogits(Theirs):
    """The trainers whose loss starts from logits and from inputs of either side."""

    def loss(self, batch, seed, **settings):
        """(loss, gradient of the logits, metrics)"""
        self.settings(**settings)
        logits, tokens = make_logits(batch, seed)
        inputs = fused_inputs(batch) | {"input_ids": tokens}
        labels = tokens.masked_fill(inputs["completion_mask"] == 0, -100)
        sides = {}
        for name, values in {"input_ids": tokens, "attention_mask": inputs["attention_mask"], "labels": labels}.items():
            sides[f"chosen_{name}"], sides[f"rejected_{name}"] = values.chunk(2)

        def loss(leaf):
            def model(ids, **kwargs):
                assert torch.equal(ids, tokens)
                return SimpleNamespace(logits=leaf)

            return self.trainer.get_batch_loss_metrics(model, sides)

        return value_and_gradient(loss, logits)


@pytest.fixture
def cpo(cpo_trainer, monkeypatch):
    return WithLogits(cpo_trainer, monkeypatch)


@pytest.fixture
def orpo(orpo_trainer, monkeypatch):
    return WithLogits(orpo_trainer, monkeypatch)


def from_logits(api, batch, seed, loss):
    """`loss(tokens [2P, T])` of our log-probabilities of these logits: value, and gradient of the logits."""
    logits, tokens = make_logits(batch, seed)
    return value_and_gradient(lambda leaf: loss(api.logits_logprobs(leaf[:, :-1].contiguous(), tokens[:, 1:]).logp), logits)


def nll(api, tokens, mask):
    """Mean over the tokens of all chosen responses together."""
    return -api.masked_aggregate(tokens.chunk(2)[0], mask.chunk(2)[0], agg="token-mean")


CPO = {
    "sigmoid": ({}, {}),
    "sigmoid, smoothed": ({"loss_type": "sigmoid", "label_smoothing": SMOOTHING}, {"label_smoothing": SMOOTHING}),
    "hinge": ({}, {"kind": "hinge"}),
    "ipo": ({}, {"kind": "ipo", "average": "logp"}),
    "simpo": ({"simpo_gamma": 0.5}, {"average": "logp", "offset": 0.5}),
    "simpo, smoothed": (
        {"loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": SMOOTHING},
        {"average": "logp", "offset": 0.5, "label_smoothing": SMOOTHING},
    ),
}


def our_cpo(api, batch, seed, name, *, sft=0.0, beta=BETA, **options):
    options = CPO[name][1] | options
    if options.get("average"):
        options["chosen_lengths"], options["rejected_lengths"] = batch.lengths

    def loss(tokens):
        value = api.preference_loss(*response_sums(tokens, batch.mask), beta=beta, **options).loss
        return value + sft * nll(api, tokens, batch.mask) if sft else value

    return from_logits(api, batch, seed, loss)


@pytest.mark.parametrize("sft", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("name", CPO)
@each_dtype
@each_seed
def test_cpo(api, cpo, name, sft, dtype, seed):
    batch = make_pairs(seed, dtype)
    settings = {"loss_type": name, "simpo_gamma": 0.0} | CPO[name][0]
    beta = 2.0 if "simpo" in name else BETA
    cpo.monkeypatch.setattr(cpo.trainer, "simpo_gamma", 0.0, raising=False)  # there with loss_type="simpo" alone
    expected = cpo.loss(batch, seed, beta=beta, cpo_alpha=sft, **settings)
    same(our_cpo(api, batch, seed, name, sft=sft, beta=beta), expected, dtype)


@pytest.mark.parametrize("alpha", [0.25, -0.4])
@pytest.mark.parametrize("name", ["simpo", "simpo, smoothed", "ipo"])
@each_dtype
def test_alphapo(api, cpo, name, alpha, dtype):
    batch = make_pairs(7, dtype)
    cpo.monkeypatch.setattr(cpo.trainer, "simpo_gamma", 0.0, raising=False)
    expected = cpo.loss(batch, 7, **({"loss_type": name, "cpo_alpha": 0.0, "alpha": alpha, "beta": 2.0} | CPO[name][0]))
    same(our_cpo(api, batch, 7, name, beta=2.0, score="alpha_divergence", alpha=alpha), expected, dtype)


def test_the_defaults_of_cpo():
    """What is called simpo there is SimPO and the log-likelihood of the chosen, with a tenth of a sensible beta."""
    simpo = CPOConfig(output_dir="x", loss_type="simpo", report_to="none", use_cpu=True, bf16=False)
    assert (simpo.cpo_alpha, simpo.beta, simpo.simpo_gamma, simpo.alpha) == (1.0, 0.1, 0.5, 0.0)
    alphapo = CPOConfig(output_dir="x", loss_type="alphapo", report_to="none", use_cpu=True, bf16=False)
    assert (alphapo.loss_type, alphapo.cpo_alpha) == ("simpo", 0.0)


def log_odds_loss(api, batch, tokens, beta):
    chosen, rejected = batch.lengths
    return beta * api.preference_loss(
        *response_sums(tokens, batch.mask), beta=1.0, score="log_odds", average="logp",
        chosen_lengths=chosen, rejected_lengths=rejected,
    ).loss  # fmt: skip


@pytest.mark.parametrize("beta", [0.1, 1.0])
@each_dtype
@each_seed
def test_orpo(api, orpo, beta, dtype, seed):
    """TRL takes odds in float32 whatever comes, and the likelihood of the chosen with its prompt."""
    batch = make_pairs(seed, dtype)
    expected = orpo.loss(batch, seed, beta=beta)

    def loss(tokens, inside=batch.inside):
        return log_odds_loss(api, batch, tokens, beta) + nll(api, tokens, inside)

    same(from_logits(api, batch, seed, loss), expected, F32)
    of_responses = from_logits(api, batch, seed, lambda tokens: loss(tokens, batch.mask))
    assert not torch.isclose(of_responses[0], expected[0].to(dtype), rtol=1e-4)


class TPO(Theirs):
    def loss(self, batch, seed, gold=None, **settings):
        """(loss, gradient of the pairs' logits, metrics); the first half of `gold` are the third responses."""
        self.settings(**{"tpo_alpha": 0.0} | settings)
        logits, tokens = make_logits(batch, seed)
        inputs = fused_inputs(batch) | {"input_ids": tokens}
        third = []
        if gold is not None:
            of_gold, tokens = make_logits(gold, seed + 1)
            third = [of_gold[: gold.pairs]]
            more = fused_inputs(gold) | {"input_ids": tokens}
            inputs = {name: torch.cat([values, more[name][: gold.pairs]]) for name, values in inputs.items()}

        def loss(leaf):
            return self.trainer.compute_loss(lambda **kwargs: SimpleNamespace(logits=torch.cat([leaf, *third])), inputs)

        value, gradient, _ = value_and_gradient(loss, logits)
        return value, gradient, self.metrics


@pytest.fixture(scope="module")
def tpo_trainer(model_path, tmp_path_factory):
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    columns = PREFERENCES | {"reference": ["c"] * 4}
    return build(TPOTrainer, TPOConfig, model_path, tmp_path_factory.mktemp("tpo"), columns)


@pytest.fixture
def tpo(tpo_trainer, monkeypatch):
    return TPO(tpo_trainer, monkeypatch)


TPO_LOSSES = {
    "sigmoid": ({"label_smoothing": SMOOTHING}, {"label_smoothing": SMOOTHING}),
    "hinge": ({}, {"kind": "hinge"}),
    "ipo": ({}, {"kind": "ipo", "average": "logp"}),
    "tpo-l": ({"tpo_l_gamma": 0.7}, {"average": "logp", "offset": 0.7}),
}


@pytest.mark.parametrize("name", TPO_LOSSES)
@each_dtype
def test_triple_preferences(api, tpo, name, dtype):
    """TPO of gold responses: a loss of pairs without reference, and a likelihood of a third response."""
    batch, gold = make_pairs(8, dtype), make_pairs(9, dtype)
    settings, options = TPO_LOSSES[name]
    expected = tpo.loss(batch, 8, loss_type=name, beta=0.6, **settings)
    if "average" in options:
        options = options | dict(zip(("chosen_lengths", "rejected_lengths"), batch.lengths, strict=True))

    def loss(tokens):
        return api.preference_loss(*response_sums(tokens, batch.mask), beta=0.6, **options).loss

    mine = from_logits(api, batch, 8, loss)
    same(mine, expected, dtype)
    with_gold = tpo.loss(batch, 8, gold, loss_type=name, beta=0.6, tpo_alpha=0.4, **settings)
    close(mine[0] + 0.4 * from_logits(api, gold, 9, lambda tokens: nll(api, tokens, gold.mask))[0], with_gold[0], dtype)


# ---------------------------------------------------------------------------------------------------------- reward models


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
@each_dtype
def test_reward_model(api, reward_trainer, monkeypatch, with_margin, center, dtype):
    batch = make_pairs(11, dtype)
    theirs = Theirs(reward_trainer, monkeypatch)
    theirs.settings(center_rewards_coefficient=center)
    inputs = {"attention_mask": torch.ones(1)} | ({"margin": batch.margins} if with_margin else {})

    def expected(leaf):
        return reward_trainer.compute_loss(lambda **kwargs: SimpleNamespace(logits=leaf[:, None]), dict(inputs))

    def mine(leaf):
        chosen, rejected = leaf.chunk(2)
        out = api.preference_loss(chosen, rejected, beta=1.0, offset=batch.margins if with_margin else 0.0)
        return out.loss + (center or 0.0) * (chosen + rejected).square().mean(), out.metrics

    rewards = batch.logp[:, 0] + 1
    ours = value_and_gradient(mine, rewards)
    same(ours, value_and_gradient(expected, rewards), dtype)
    assert ours[2]["accuracy"].item() == pytest.approx(theirs.metrics["accuracy"])
    assert ours[2]["reward_margin"].item() == pytest.approx(theirs.metrics["margin"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("weighted", [False, True], ids=["dpo", "wpo"])
def test_a_step_of_the_trainer(api, dpo, model_path, weighted):
    """TRL's head and its loss, against ours, on the hidden states of the same model: gradients of all its parameters."""
    batch = make_pairs(12, F32)
    policy, reference = (transformers.LlamaForCausalLM.from_pretrained(model_path) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*policy.parameters(), *reference.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    inputs = fused_inputs(batch)
    inputs["input_ids"] = torch.randint(3, VOCABULARY, inputs["input_ids"].shape, generator=generator)
    targets = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]

    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    for model in (policy, reference):
        trl.trainer.utils.add_fused_lm_head(model, outputs=outputs)
    dpo.settings(ref_model=reference, loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=weighted)
    expected = dpo.trainer.compute_loss(policy, inputs)
    expected_gradients = torch.autograd.grad(expected, list(policy.parameters()))

    def statistics(model):
        model_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        hidden = model.model(**model_inputs, use_cache=False).last_hidden_state[:, :-1]
        return api.linear_logprobs(hidden, model.lm_head.weight, targets, outputs=("sum_sq_probs",))

    stats = statistics(policy)
    with torch.no_grad():
        refs = response_sums(statistics(reference).logp, batch.mask)
    weight = None
    if weighted:
        found = {"logp": stats.logp.detach(), "log_sum_sq_probs": stats.sum_sq_probs.log()}
        weight = wpo_weight(replace(batch, **found))
    mine = api.preference_loss(*response_sums(stats.logp, batch.mask), *refs, beta=BETA, weight=weight).loss
    close(mine.detach(), expected.detach(), F32)
    for ours, theirs in zip(torch.autograd.grad(mine, list(policy.parameters())), expected_gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_hooks_are_hit(dpo_trainer, kto_trainer, cpo_trainer, orpo_trainer, reward_trainer):
    """What this file calls is what the installed release trains with."""
    for trainer, methods in {
        dpo_trainer: ("compute_loss", "_compute_loss"),
        kto_trainer: ("compute_loss", "_compute_loss", "_compute_kl_logps"),
        cpo_trainer: ("compute_loss", "get_batch_loss_metrics", "cpo_loss"),
        orpo_trainer: ("compute_loss", "get_batch_loss_metrics", "odds_ratio_loss"),
        reward_trainer: ("compute_loss",),
    }.items():
        for name in methods:
            assert name in vars(type(trainer)), name
    for trainer, inner in ((cpo_trainer, "get_batch_loss_metrics"), (dpo_trainer, "_compute_loss")):
        assert f"self.{inner}(" in inspect.getsource(type(trainer).compute_loss)


def test_every_loss_of_trl_is_here():
    """The names that its own message lists."""
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    listed = source[source.index("Should be one of [") :].split("]")[0]
    theirs = {word for word in listed.split("'") if word.isidentifier()}
    assert theirs == {*LOSSES, "aot", "aot_unpaired", "sft"}


# ------------------------------------------------------------------------------------------------------- recipes, by name

packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def our_recipe(name, batch, *, packed=False, logp=None, extra=None, reference=True):
    """Loss and gradient of every token. extra: per token like `batch.logp`, or per pair."""
    hidden = batch.nan_outside()

    def argument(values):
        return values[batch.inside] if packed and values.shape == batch.mask.shape else values

    cu_seqlens = None
    if packed:
        cu_seqlens = torch.cat([torch.zeros(1), batch.inside.sum(1).cumsum(0)]).to(torch.int32)

    def loss(leaf):
        pairs = Pairs(
            argument(leaf), argument(batch.mask), argument(hidden.ref_logp) if reference else None, cu_seqlens,
            {key: argument(values) for key, values in (extra or {}).items()},
        )  # fmt: skip
        return load_pair_recipe(name).loss(pairs)

    return value_and_gradient(loss, hidden.logp if logp is None else logp)


SMOOTHED = {"label_smoothing": SMOOTHING}
DPO_RECIPES = {
    "dpo:beta=0.3": ("sigmoid", {"beta": 0.3}),
    "slic": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo:label_smoothing=0.1": ("exo_pair", ROUNDED),
    "nca": ("nca_pair", {}),
    "robust_dpo": ("robust", SMOOTHED),
    "bco": ("bco_pair", {}),
    "apo_anchored:anchor=zero": ("apo_zero", {}),
    "apo_anchored:anchor=down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "ln_dpo": ("sigmoid_norm", {}),
    "aot:label_smoothing=0.1": ("aot", SMOOTHED),
    "aot:form=unpaired": ("aot_unpaired", {}),
    "f_dpo:divergence=forward_kl": ("sigmoid", {"f_divergence_type": "forward_kl"}),
    "f_dpo": ("sigmoid", {"f_divergence_type": "js_divergence"}),
    "ld_dpo:alpha=0.25": ("sigmoid", {"ld_alpha": 0.25}),
    "rpo:nll_weight=1.5": (["sigmoid", "sft"], {"weights": [1.0, 1.5]}),
}


@pytest.mark.parametrize("name", DPO_RECIPES)
@packed_or_not
@each_dtype
def test_recipes_of_the_dpo_trainer(dpo, name, packed, dtype):
    batch = make_pairs(15, dtype)
    loss_type, settings = DPO_RECIPES[name]
    same(our_recipe(name, batch, packed=packed), dpo.loss(batch, loss_type, **settings), dtype)


@pytest.mark.parametrize("coefficient", [0.3, 0.5])
def test_f_dpo_in_trls_convention(dpo, coefficient):
    batch = make_pairs(16, F32, spread=0.2)
    expected = dpo.loss(batch, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient)
    name = f"f_dpo:divergence=alpha_divergence,alpha={coefficient}"
    same(our_recipe(name + ",convention=trl", batch), expected, F32)
    if coefficient != 0.5:
        assert not torch.isclose(our_recipe(name, batch)[0], expected[0], rtol=1e-4)


@packed_or_not
def test_wpo_recipe_clamps_unless_asked_not_to(dpo, packed):
    batch = make_pairs(9)
    extra = {"sum_sq_probs": batch.nan_outside().log_sum_sq_probs.exp()}
    expected = dpo.loss(batch, use_weighting=True)
    same(our_recipe("wpo:clamp=None", batch, packed=packed, extra=extra), expected)
    assert our_recipe("wpo", batch, packed=packed, extra=extra)[0] < expected[0]


@packed_or_not
def test_sppo_recipe_with_a_sure_judge(dpo, packed):
    """TRL's loss is the sum of two squares, that of the paper their mean."""
    batch = make_pairs(17)
    ones = torch.ones(batch.pairs, dtype=F64)
    expected = dpo.loss(batch, "sppo_hard", beta=0.2)
    mine = our_recipe("sppo:eta=5.0", batch, packed=packed, extra={"chosen_win": ones, "rejected_win": 0 * ones})
    same([2 * x for x in mine[:2]], expected)
    same(our_recipe("sppo:eta=5.0,mode=hard", batch, packed=packed), expected)


@packed_or_not
@each_dtype
def test_kto_recipe(kto, packed, dtype):
    batch, label, kl_logp, ref_kl_logp = judged(8, dtype)
    label = torch.arange(len(label)) < batch.pairs
    expected = kto.loss(batch, label, kl_logp, ref_kl_logp, beta=0.3, **WEIGHTS)
    extra = {"kl": prefkern.papers.kto.kto_kl(kl_logp, ref_kl_logp)}
    same(our_recipe("kto:beta=0.3,undesirable_weight=1.33", batch, packed=packed, extra=extra), expected, dtype)
    no_kl = kto.loss(batch, label, ref_kl_logp, ref_kl_logp, beta=0.3, **WEIGHTS)
    same(our_recipe("kto:beta=0.3,undesirable_weight=1.33", batch, packed=packed), no_kl, dtype)


def test_kto_mismatches_as_trl_does(kto_trainer):
    rows = kto_trainer.train_dataset
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows["completion_ids"]], batch_first=True)
    theirs = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows["KL_completion_ids"]], batch_first=True)
    assert torch.equal(prefkern.papers.kto.kto_mismatched(ids), theirs)


def recipe_from_logits(name, batch, seed, extra=None):
    """The same, from logits, which a recipe without reference starts from."""
    logits, tokens = make_logits(batch, seed)

    def loss(leaf):
        logp = prefkern.logits_logprobs(leaf[:, :-1].contiguous(), tokens[:, 1:]).logp
        return load_pair_recipe(name).loss(Pairs(logp, batch.mask, extra=extra(logp) if extra else None))

    return value_and_gradient(loss, logits)


CPO_RECIPES = {
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0},
    "cpo:label_smoothing=0.1,cpo_alpha=0.3": {"loss_type": "sigmoid", "cpo_alpha": 0.3} | SMOOTHED,
    "cpo:kind=hinge,cpo_alpha=0.0": {"loss_type": "hinge", "cpo_alpha": 0.0},
    "cpo:kind=ipo": {"loss_type": "ipo", "cpo_alpha": 1.0},
    "cpo:kind=simpo,beta=2.0": {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 0.5},
    "cpo:kind=simpo,beta=2.0,alpha=0.25,gamma=0.3,cpo_alpha=0.0": {
        "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.3, "alpha": 0.25,
    },
    "simpo:gamma=0.5": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    "simpo:gamma=0.5,sft_weight=1.0,label_smoothing=0.1": {
        "loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": SMOOTHING,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CPO_RECIPES)
@each_dtype
def test_recipes_of_the_cpo_trainer(cpo, name, dtype):
    batch = make_pairs(18, dtype)
    cpo.monkeypatch.setattr(cpo.trainer, "simpo_gamma", 0.0, raising=False)
    expected = cpo.loss(batch, 18, **{"beta": BETA} | CPO_RECIPES[name])
    same(recipe_from_logits(name, batch, 18), expected, dtype)


def test_orpo_recipe_takes_the_likelihood_of_what_it_is_given(orpo):
    """TRL's is over prompt and response; Liger's, and ours by default, over the response."""
    batch = make_pairs(19, F32)

    def extra(logp):
        inside = batch.inside[: batch.pairs]
        return {"nll_logp": logp[: batch.pairs].where(inside, 0.0).sum(1), "nll_lengths": inside.sum(1)}

    expected = orpo.loss(batch, 19, beta=0.3)
    same(recipe_from_logits("orpo:nll=given,beta=0.3", batch, 19, extra), expected, F32)
    assert not torch.isclose(recipe_from_logits("orpo:beta=0.3", batch, 19)[0], expected[0], rtol=1e-4)


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_model_loss(reward_trainer, monkeypatch, center):
    batch = make_pairs(20)
    Theirs(reward_trainer, monkeypatch).settings(center_rewards_coefficient=center or None)
    inputs = {"attention_mask": torch.ones(1), "margin": batch.margins}
    rewards = batch.logp[:, 0] + 1
    expected = value_and_gradient(
        lambda leaf: reward_trainer.compute_loss(lambda **_: SimpleNamespace(logits=leaf[:, None]), dict(inputs)), rewards
    )
    mine = value_and_gradient(
        lambda leaf: prefkern.papers.reward_model.reward_model_loss(*leaf.chunk(2), margin=batch.margins, centering=center),
        rewards,
    )
    same(mine, expected)
