"""The part of slime that calls custom functions, as its training backend does: same modules, names, arguments and shapes."""

import importlib
import sys
from argparse import Namespace
from types import ModuleType

import torch

FLAGS = (
    "--custom-config-path", "--custom-advantage-function-path", "--loss-type", "--custom-loss-function-path",
    "--custom-tis-function-path", "--custom-pg-loss-reducer-function-path", "--rollout-data-postprocess-path",
    "--calculate-per-token-loss", "--use-kl-loss", "--use-tis", "--tis-clip-low", "--tis-clip", "--eps-clip", "--eps-clip-high",
    "--eps-clip-c",
)  # fmt: skip
"""Of slime's parser."""
context_parallel = {"rank": 0, "size": 1}


def arguments(**options):
    """What slime's parser gives, as far as it is read; the keys of --custom-config-path are set on it."""
    defaults = {
        "n_samples_per_prompt": 4, "rollout_batch_size": 2,
        "normalize_advantages": False, "kl_coef": 0.0, "calculate_per_token_loss": False,
        "eps_clip": 0.2, "eps_clip_high": 0.2, "eps_clip_c": None, "entropy_coef": 0.0, "use_kl_loss": False,
        "kl_loss_coef": 0.0, "kl_loss_type": "k1", "use_unbiased_kl": False, "use_rollout_logprobs": False, "use_tis": False,
        "get_mismatch_metrics": False, "use_opsm": False, "tis_clip": 2.0, "tis_clip_low": 0, "custom_tis_function_path": None,
        "custom_pg_loss_reducer_function_path": None, "context_parallel_size": context_parallel["size"],
        "rollout_temperature": 1.0, "rollout_top_p": 1.0,
    }  # fmt: skip
    return Namespace(**defaults | options)


def chunks(total_length, response_length):
    """Where this rank's response tokens lie in the response: it has the r-th and the (2 size - 1 - r)-th of 2 size chunks."""
    rank, size = context_parallel["rank"], context_parallel["size"]
    prompt, chunk = total_length - response_length, -(-total_length // (2 * size))
    places = []
    for k in (rank, 2 * size - 1 - rank):
        start, end = max(k * chunk, prompt - 1), min((k + 1) * chunk, total_length - 1)
        places.append((start + 1 - prompt, end + 1 - prompt) if start < end else (0, 0))
    return places


def slice_log_prob_with_cp(log_prob, total_length, response_length):
    assert len(log_prob) == response_length
    if context_parallel["size"] == 1:
        return log_prob
    return torch.cat([log_prob[start:end] for start, end in chunks(total_length, response_length)])


def get_log_probs_and_entropy(
    logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, non_loss_data=True,
    top_p_token_ids=None, top_p_token_offsets=None,
):  # fmt: skip
    """Here logits are those of whole sequences whatever the rank; in slime a rank has its chunks."""
    assert logits.dtype == torch.float32 and logits.shape[0] == 1
    result = {"log_probs": [], "entropy": []}
    start = 0
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        logp = (logits[0, start + total - response - 1 : start + total - 1] / args.rollout_temperature).log_softmax(-1)
        start += total
        chosen = logp.gather(-1, tokens[total - response :, None])[:, 0]
        result["log_probs"].append(slice_log_prob_with_cp(chosen, total, response))
        result["entropy"].append(slice_log_prob_with_cp(-(logp.exp() * logp).sum(-1), total, response))
    return torch.empty(0), result


def get_rollout_top_p_logprob_kwargs(args, batch):
    return {}


def vanilla_tis_function(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    ratio = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()
    weights = ratio.clamp(args.tis_clip_low, args.tis_clip)
    metrics = {"tis": ratio, "tis_clipfrac": (weights != ratio).float(), "tis_abs": (ratio - 1).abs()}
    return pg_loss * weights, loss_masks, metrics


def compute_approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
    assert kl_loss_type == "k2" and importance_ratio is None
    return (log_probs - log_probs_base).square() / 2


def load_function(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def sample_means(args, batch):
    """The reducer that slime hands to a loss."""

    def reduce(x):
        total = 0
        sizes = []
        for mask, n, length in zip(batch["loss_masks"], batch["response_lengths"], batch["total_lengths"], strict=True):
            sizes.append(len(slice_log_prob_with_cp(mask, length, n)))
        columns = zip(
            x.split(sizes), batch["loss_masks"], batch["rollout_mask_sums"], batch["total_lengths"], batch["response_lengths"],
            strict=True,
        )  # fmt: skip
        for row, mask, tokens, length, n in columns:
            part = (row * slice_log_prob_with_cp(mask, length, n)).sum()
            total = total + (part if args.calculate_per_token_loss else part / max(float(tokens), 1))
        return total

    return reduce


def train_step(args, function, batches, global_batch_size):
    """The loss and metrics of a step: what slime divides by, and sums over micro-batches."""
    loss, metrics, tokens = 0, {}, 0
    for batch in batches:
        value, log = function(args, batch, batch["logits"], sample_means(args, batch))
        assert value.dim() == 0
        tokens += sum(max(int(m.sum()), 1) for m in batch["loss_masks"])
        torch.tensor(list(log.values()))  # as slime packs them: scalars
        loss = loss + value
        for key, number in log.items():
            metrics[key] = metrics.get(key, 0) + float(number)
    divisor = tokens if args.calculate_per_token_loss else global_batch_size
    return loss / divisor, {key: number / divisor for key, number in metrics.items()}


def install(monkeypatch):
    """These functions, under slime's names."""
    contents = {
        "slime": {},
        "slime.backends": {},
        "slime.backends.megatron_utils": {},
        "slime.backends.megatron_utils.loss": {
            "get_log_probs_and_entropy": get_log_probs_and_entropy,
            "get_rollout_top_p_logprob_kwargs": get_rollout_top_p_logprob_kwargs,
            "vanilla_tis_function": vanilla_tis_function,
        },
        "slime.backends.megatron_utils.cp_utils": {"slice_log_prob_with_cp": slice_log_prob_with_cp},
        "slime.utils": {},
        "slime.utils.misc": {"load_function": load_function},
        "slime.utils.ppo_utils": {"compute_approx_kl": compute_approx_kl},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
