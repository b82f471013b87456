"""slime: advantages, loss, importance weights and loss reducer of a recipe, for slime's custom function paths.

    --custom-config-path prefkern.yaml                    # holds the line   prefkern_recipe: "ngrpo:r_max=2.0"
    --custom-advantage-function-path prefkern.integrations.slime.advantages
    --loss-type custom_loss --custom-loss-function-path prefkern.integrations.slime.loss
    --custom-tis-function-path prefkern.integrations.slime.importance

The recipe comes from ``args.prefkern_recipe``, where slime puts the keys of that file, or else from the environment variable
``PREFKERN_RECIPE``. Advantages and loss can be used without each other.

What decides where both say something. The recipe: clip bounds and dual clip; slime's own (``--eps-clip`` and so on), if
changed from their defaults to something else, are an error. slime: the mean over completions or, with
``--calculate-per-token-loss``, over tokens; entropy bonus, KL loss, truncated importance sampling.

Rewards are the raw ones of the whole rollout batch, which every rank has, so that groups may lie across data-parallel
ranks; what also needs lengths or tokens needs whole groups on each rank, and is an error otherwise. Losses of whole
completions (gspo, gmpo, rloo, gtpo) need a context-parallel size of 1.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ops import importance_weights, policy_loss
from ..papers import Recipe, Rollout, dapo, etr, gtpo, load_recipe
from ..papers._recipe import multiply
from ._hooks import kl_in_loss, token_loss, warn_once

RECIPE_VARIABLE = "PREFKERN_RECIPE"

_OWN = {"ppo": "ppo", "reinforce_pp": "reinforce_plus_plus or reinforce_plus_plus_baseline"}
_SETTINGS = {"eps_clip": ("eps_low", 0.2), "eps_clip_high": ("eps_high", 0.2), "eps_clip_c": ("dual_clip", None)}
_NAMES = {"old_logp": "log_probs", "ref_logp": "ref_log_probs", "values": "values"}
_WHOLE_COMPLETIONS = ("gspo", "gmpo", "rloo", "gtpo")
_warned: set[str] = set()


def chosen(args: Any = None) -> Recipe:
    """The recipe that `args.prefkern_recipe` or the environment names."""
    text = getattr(args, "prefkern_recipe", None) or os.environ.get(RECIPE_VARIABLE)
    if not text:
        raise ValueError(
            "no recipe is chosen: put prefkern_recipe: <recipe> into the file of --custom-config-path, or set "
            f"{RECIPE_VARIABLE}"
        )
    return load_recipe(text)


# ----------------------------------------------------------------------------------------------------------- advantages


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Put the recipe's advantages into `rollout_data`: for `--custom-advantage-function-path`.

    Reads raw_reward (of the whole batch), partition (where this rank's completions stand in it), loss_masks, tokens, kl (for
    shapes: one tensor per completion, of the tokens that this context-parallel rank has), and by name what else a recipe
    needs, one value per completion of this rank. Several rewards, or others than the raw ones, may be put into
    prefkern_rewards, one number or list per completion of this rank, in `--rollout-data-postprocess-path`.

    Writes advantages and returns, lists of float32 tensors like kl. Recipes whose loss needs a second number per token (gtpo
    its conflict weights, etr the scale of its bounds) have it in returns, for :func:`loss`.
    """
    recipe = chosen(args)
    _check_advantages(args, recipe)
    like: list[Tensor] = rollout_data["kl"]
    device = like[0].device
    if _needs_rows_only(recipe) and "prefkern_rewards" not in rollout_data:
        rewards = torch.tensor([float(r) for r in rollout_data["raw_reward"]], device=device)
        group = _groups(args, torch.arange(len(rewards), device=device), len(rewards))
        here = torch.as_tensor(list(rollout_data["partition"]), device=device)
        rows, second = (None if x is None else x[here] for x in _row_advantages(recipe, Rollout(rewards, group)))
        assert rows is not None
        rollout_data["advantages"] = _spread(rows, like)
        rollout_data["returns"] = _spread(rows if second is None else second, like)
        return
    rollout = _local_rollout(args, recipe, rollout_data, device)
    prepared = recipe.prepare(rollout)
    rows = prepared["advantages"]
    if isinstance(recipe, dapo.DAPO):
        rows = torch.where(prepared["mask"].any(1), rows, 0.0)
    rollout_data["advantages"] = rollout_data["returns"] = _spread(rows, like)
    if isinstance(recipe, etr.ETR):
        rollout_data["returns"] = _spread(prepared["eps_high"] / recipe.eps_high, like)
    if isinstance(recipe, gtpo.GTPO):
        rollout_data["returns"] = [
            _here(args, weights[:n].float(), total, n)
            for weights, total, n in zip(
                prepared["weights"], rollout_data["total_lengths"], rollout_data["response_lengths"], strict=True
            )
        ]


def _groups(args: Any, places: Tensor, total: int) -> Tensor:
    """The groups of completions by their places in the rollout batch, where those of a prompt stand together."""
    samples = args.n_samples_per_prompt
    prompts = getattr(args, "rollout_batch_size", None)
    if total % samples or (prompts is not None and total != prompts * samples):
        raise ValueError(
            f"raw_reward has {total} rewards, but rollout_batch_size is {prompts} and n_samples_per_prompt {samples}: which of "
            "them belong to one prompt cannot be told"
        )
    return places // samples


def _check_advantages(args: Any, recipe: Recipe) -> None:
    name = recipe.name
    if name in _OWN:
        raise ValueError(f"recipe {name!r}: slime's own --advantage-estimator {_OWN[name]} is the same, with its critic and KL")
    if name == "tppo" or (recipe.whole_groups and name != "reg_grpo"):
        token_loss(recipe, "slime")  # has none, and says so
    if getattr(args, "normalize_advantages", False):
        raise ValueError(f"--normalize-advantages would whiten the advantages of recipe {name!r}; leave it out")
    if getattr(args, "kl_coef", 0.0) != 0:
        raise ValueError(f"--kl-coef has no place in the advantages of recipe {name!r}; use --use-kl-loss")
    if (beta := kl_in_loss(recipe)) != 0:
        raise ValueError(f"recipe {name!r} has beta {beta}; slime adds the KL: use --use-kl-loss and leave beta at 0")


def _needs_rows_only(recipe: Recipe) -> bool:
    """Whether rewards and groups are all that the advantages are made of."""
    reads_lengths = (
        recipe.name in ("opo", "gtpo")
        or (recipe.name == "dgpo" and recipe.token_rescale)  # type: ignore[attr-defined]
        or (recipe.name == "gdpo" and recipe.batch_norm == "token")  # type: ignore[attr-defined]
        or (isinstance(recipe, dapo.DAPO) and recipe.max_length is not None)
    )
    return not recipe.needs and not reads_lengths


def _row_advantages(recipe: Recipe, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
    """[B], and what else the loss needs of each row."""
    rows = recipe.advantages(rollout)
    if isinstance(recipe, dapo.DAPO) and recipe.dynamic_sampling:
        rows = torch.where(dapo.keep_groups(rollout.rewards, rollout.group), rows, 0.0)
    if not isinstance(recipe, etr.ETR):
        return rows, None
    scale = etr.elastic_scale(
        rows, rollout.rewards, rollout.group, alpha=recipe.alpha, beta=recipe.beta, a_cap=recipe.a_cap, s_min=recipe.s_min,
        s_max=recipe.s_max, reward_range=recipe.reward_range,
    ).scale  # fmt: skip
    return rows, scale


def _local_rollout(args: Any, recipe: Recipe, data: Mapping[str, Any], device: torch.device) -> Rollout:
    """The completions of this rank, padded; ValueError if it has parts of groups only."""
    places = torch.as_tensor(list(data["partition"]))
    group = _groups(args, places, len(data["raw_reward"]))
    _, sizes = group.unique(return_counts=True)
    if not bool((sizes == args.n_samples_per_prompt).all()):
        raise ValueError(
            f"recipe {recipe.name!r} needs whole groups on each data-parallel rank, but this one has parts of some; "
            "leave out --balance-data, with global_batch_size / data-parallel size a multiple of n_samples_per_prompt"
        )
    raw = data["prefkern_rewards"] if "prefkern_rewards" in data else [data["raw_reward"][i] for i in places.tolist()]
    rewards = torch.as_tensor(raw, dtype=torch.float32, device=device)
    lengths = data["response_lengths"]
    mask = _padded(data["loss_masks"]).bool()
    tokens = _padded([torch.as_tensor(t)[len(t) - n :] for t, n in zip(data["tokens"], lengths, strict=True)])
    fields: dict[str, Any] = {}
    extra: dict[str, Tensor] = {}
    for need in recipe.needs:
        if need == "tokens":
            fields["tokens"] = tokens.to(device)
            continue
        found = data.get(_NAMES.get(need, need))
        if found is None:
            raise ValueError(
                f"recipe {recipe.name!r} needs {_NAMES.get(need, need)!r}, which is not in slime's rollout data; put one value "
                "per completion there in --rollout-data-postprocess-path"
            )
        if need in _NAMES:
            _no_context_parallel(args, recipe)
            (fields if need in Rollout.__dataclass_fields__ else extra)[need] = _padded(found).to(device)
        else:
            extra[need] = torch.as_tensor(found, device=device)
    return Rollout(rewards=rewards, group=group.to(device), mask=mask.to(device), extra=extra, **fields)


def _padded(rows: Sequence[Any]) -> Tensor:
    """[B, T]"""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


def _spread(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Each row's value at each of its tokens."""
    return [torch.ones_like(x, dtype=torch.float32) * row.float() for x, row in zip(like, rows, strict=True)]


# ----------------------------------------------------------------------------------------------------------------- loss


def loss(
    args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's loss of a micro-batch, with slime's entropy and KL terms: for `--custom-loss-function-path`.

    logits: float32 [1, T, V]. Returns the sum over completions (with --calculate-per-token-loss: over tokens), which slime
    divides, and metrics under the names of slime's own policy loss. pg_clipfrac is the share of the micro-batch's tokens.
    """
    recipe = chosen(args)
    special = isinstance(recipe, (gtpo.GTPO, etr.ETR))
    options = {} if special else token_loss(recipe, "slime").options
    _check_loss(args, recipe, options)
    home = importlib.import_module("slime.backends.megatron_utils.loss")
    lengths, totals = batch["response_lengths"], batch["total_lengths"]
    _, out = home.get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=totals, response_lengths=lengths,
        with_entropy=True, **home.get_rollout_top_p_logprob_kwargs(args, batch),
    )  # fmt: skip
    logp: list[Tensor] = out["log_probs"]
    old = batch["rollout_log_probs"] if getattr(args, "use_rollout_logprobs", False) else batch.get("log_probs")
    old = old or [row.detach() for row in logp]
    tis, masks, metrics = _tis(args, home, batch, logp)
    here = [_here(args, mask, total, n).bool() for mask, total, n in zip(masks, totals, lengths, strict=True)]
    rows = _Rows(
        logp=_padded(logp),
        old=_padded(old),
        advantages=_padded(batch["advantages"]),
        mask=_padded(here),
        entropy=_padded(out["entropy"]),
        tis=None if tis is None else _padded(tis.split([len(row) for row in logp])),
    )
    flat_logp, flat_entropy = torch.cat(logp), torch.cat(out["entropy"])
    if flat_logp.numel() == 0:  # a context-parallel rank may have nothing but prompts; the gradient must flow all the same
        value, clipped = 0 * logits.sum(), torch.zeros((), device=logits.device)
    else:
        value, clipped = _recipe_loss(args, recipe, rows, batch)
    reported = {"pg_loss": value.detach(), "pg_clipfrac": clipped}
    reported["ppo_kl"] = sum_of_sample_mean(torch.cat(list(old)) - flat_logp).detach()
    entropy = sum_of_sample_mean(flat_entropy)
    reported["entropy_loss"] = entropy.detach()
    total = value - args.entropy_coef * entropy
    if args.use_kl_loss:
        ratio = torch.exp(flat_logp - torch.cat(list(old))) if getattr(args, "use_unbiased_kl", False) else None
        kl = importlib.import_module("slime.utils.ppo_utils").compute_approx_kl(
            flat_logp, torch.cat(list(batch["ref_log_probs"])), kl_loss_type=args.kl_loss_type, importance_ratio=ratio
        )
        kl_loss = sum_of_sample_mean(kl)
        reported["kl_loss"] = kl_loss.detach()
        total = total + args.kl_loss_coef * kl_loss
    if batch.get("rollout_log_probs"):
        trained = flat_logp if getattr(args, "use_rollout_logprobs", False) else torch.cat(list(old))
        away = (trained - torch.cat(list(batch["rollout_log_probs"]))).abs()
        reported["train_rollout_logprob_abs_diff"] = sum_of_sample_mean(away).detach()
    if tis is not None:
        reported["ois"] = sum_of_sample_mean(torch.exp(flat_logp - torch.cat(list(old)))).detach()
    reported |= {key: sum_of_sample_mean(metric).detach() for key, metric in metrics.items()}
    return total, {"loss": total.detach(), **reported}


class _Rows(NamedTuple):
    """A micro-batch padded, [B, T] each."""

    logp: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    entropy: Tensor
    tis: Tensor | None


def _recipe_loss(args: Any, recipe: Recipe, rows: _Rows, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum over completions or tokens, and as such a sum the share of tokens that are clipped."""
    per_token = bool(args.calculate_per_token_loss)
    count = rows.mask.sum() if per_token else len(rows.mask)
    if isinstance(recipe, gtpo.GTPO):
        if recipe.variant == "code":
            raise ValueError("recipe 'gtpo' has variant 'code', which does not average over completions; use variant 'paper'")
        mean, metrics = gtpo.gtpo_objective(
            rows.logp, rows.entropy, rows.advantages[:, 0], _padded(batch["returns"]), rows.mask, gamma=recipe.gamma,
            threshold=recipe.threshold, h_init=recipe.h_init, token_weight=rows.tis,
        )  # fmt: skip
        return mean * len(rows.mask), (metrics["clip_fraction_low"] + metrics["clip_fraction_high"]) * count
    if isinstance(recipe, etr.ETR):
        low, high = etr.bounds(_padded(batch["returns"])[:, 0], recipe.eps_low, recipe.eps_high)
        weight = _token_weight(args, recipe, recipe.agg, None, rows, batch)
        out = policy_loss(
            rows.logp, rows.old, rows.advantages, rows.mask, eps_low=low, eps_high=high, agg="token-sum", token_weight=weight
        )
    else:
        own = token_loss(recipe, "slime")
        if own.average == "rows":
            out = own(rows.logp, rows.old, rows.advantages, rows.mask, agg="token-mean", norm=1.0, token_weight=rows.tis)
        else:
            weight = _token_weight(args, recipe, own.agg, own.scale, rows, batch)
            out = own(rows.logp, rows.old, rows.advantages, rows.mask, agg="token-sum", token_weight=weight)
    metrics = out.metrics
    return out.loss, (metrics["clip_fraction_low"] + metrics["clip_fraction_high"]) * count


def _token_weight(
    args: Any, recipe: Recipe, agg: str, scale: float | None, rows: _Rows, batch: Mapping[str, Any]
) -> Tensor | None:
    """With which the sum over tokens is slime's sum over completions of their means; None for 1."""
    if args.calculate_per_token_loss:
        if agg != "token-mean":
            _say_aggregation(recipe, agg, "the mean over tokens (--calculate-per-token-loss)")
        return rows.tis
    if agg == "seq-mean-token-sum-norm":
        if scale is None:
            raise ValueError(f"recipe {recipe.name!r} has max_length None; slime has no padded length, so give it one")
        weight = torch.full_like(rows.logp[:, 0].detach(), 1 / scale)
    elif agg == "seq-mean-token-sum":
        return rows.tis
    else:
        if agg != "seq-mean-token-mean":
            _say_aggregation(recipe, agg, "the mean over completions (without --calculate-per-token-loss)")
        sums = batch.get("rollout_mask_sums")
        sums = rows.mask.sum(1) if sums is None else torch.stack([torch.as_tensor(x) for x in sums])
        weight = 1 / sums.to(rows.logp).clamp_min(1)
    return multiply(weight, rows.tis)


def _say_aggregation(recipe: Recipe, agg: str, done: str) -> None:
    warn_once(f"recipe {recipe.name!r} sums up tokens by {agg}, but slime is set to {done}, which is what is done", _warned)


def _check_loss(args: Any, recipe: Recipe, options: Mapping[str, Any]) -> None:
    """ValueError for settings of slime that contradict the recipe."""
    for setting, (option, default) in _SETTINGS.items():
        given = getattr(args, setting, default)
        used = getattr(recipe, option, None) if isinstance(recipe, etr.ETR) else options.get(option)
        if given is not None and given not in (default, used):
            raise ValueError(
                f"--{setting.replace('_', '-')} is {given}, but recipe {recipe.name!r} uses {used}; the recipe decides: leave "
                f"slime's at its default, {default}, and give the recipe the option you want"
            )
    for setting, instead in (
        ("custom_pg_loss_reducer_function_path", "the recipe's loss sums up its tokens itself"),
        ("use_opsm", "the recipe's loss has no place for its mask"),
    ):
        if getattr(args, setting, None):
            raise ValueError(f"--{setting.replace('_', '-')} is set; {instead}, so leave it out")
    if recipe.name in _WHOLE_COMPLETIONS and getattr(recipe, "level", "sequence") == "sequence":
        _no_context_parallel(args, recipe)
        if args.calculate_per_token_loss and recipe.name != "gspo":
            raise ValueError(
                f"--calculate-per-token-loss is set; recipe {recipe.name!r} has one loss per completion, so leave it out"
            )


def _no_context_parallel(args: Any, recipe: Recipe) -> None:
    if (size := getattr(args, "context_parallel_size", 1)) > 1:
        raise ValueError(f"context_parallel_size is {size}; recipe {recipe.name!r} needs whole completions on each rank, so 1")


def _here(args: Any, tokens: Tensor, total_length: int, response_length: int) -> Tensor:
    """What this context-parallel rank has of a completion's tokens."""
    return tokens if getattr(args, "context_parallel_size", 1) == 1 else _slice(tokens, total_length, response_length)


def _slice(tokens: Tensor, total_length: int, response_length: int) -> Tensor:
    cp = importlib.import_module("slime.backends.megatron_utils.cp_utils")
    part: Tensor = cp.slice_log_prob_with_cp(tokens, total_length, response_length)
    return part


def _tis(
    args: Any, home: Any, batch: Mapping[str, Any], logp: list[Tensor]
) -> tuple[Tensor | None, Sequence[Tensor], dict[str, Tensor]]:
    """Weights of all tokens (flat), masks, and metrics, of whatever function slime is set to; they multiply the loss."""
    if not (getattr(args, "use_tis", False) or getattr(args, "get_mismatch_metrics", False)):
        return None, batch["loss_masks"], {}
    path = getattr(args, "custom_tis_function_path", None)
    function = importlib.import_module("slime.utils.misc").load_function(path) if path else home.vanilla_tis_function
    ones = torch.ones_like(torch.cat(logp).detach())
    weights, masks, metrics = function(
        args=args, pg_loss=ones, train_log_probs=batch.get("log_probs") or [row.detach() for row in logp],
        rollout_log_probs=batch["rollout_log_probs"], loss_masks=batch["loss_masks"], total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )  # fmt: skip
    return weights, masks, metrics


# ------------------------------------------------------------------------------------------- importance weights, reducer


def importance(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **other: Any,
) -> tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]:
    """`prefkern.importance_weights` on the losses of tokens [N]: for `--custom-tis-function-path`.

    Bounds are --tis-clip-low and --tis-clip. ``args.prefkern_tis_level`` is "token" (default), "sequence" or "geometric",
    ``args.prefkern_tis_mode`` "truncate" (default) or "mask" (IcePop): keys of the custom configuration file. Metrics have
    slime's names: tis (the ratio of the tokens), tis_abs (its distance from 1), tis_clipfrac (where the weight is not the ratio
    of its level).
    """
    level: Any = getattr(args, "prefkern_tis_level", "token")
    mode: Any = getattr(args, "prefkern_tis_mode", "truncate")
    if level != "token" and (size := getattr(args, "context_parallel_size", 1)) > 1:
        raise ValueError(f"context_parallel_size is {size}; prefkern_tis_level {level!r} needs whole completions, so 1")
    sizes = [len(row) for row in train_log_probs]
    old, rollout = _padded(train_log_probs).detach(), _padded(rollout_log_probs).detach()
    inside = torch.arange(old.shape[1], device=old.device) < torch.tensor(sizes, device=old.device)[:, None]
    counted = inside
    if level != "token":
        counted = _padded([torch.as_tensor(m, device=old.device) for m in loss_masks]).bool()
    weights = importance_weights(
        old, rollout, counted, level=level, mode=mode, clip_min=args.tis_clip_low, clip_max=args.tis_clip, log_clamp=None
    )
    ratio = importance_weights(old, rollout, counted, level=level, clip_min=None, clip_max=None, log_clamp=None)
    token_ratio = torch.exp(old - rollout)[inside]
    metrics = {
        "tis": token_ratio,
        "tis_clipfrac": (weights != ratio)[inside].float(),
        "tis_abs": (token_ratio - 1).abs(),
    }
    return pg_loss * weights[inside].to(pg_loss.dtype), loss_masks, metrics


def pg_loss_reducer(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Token sums over a constant, as Dr. GRPO has them, with slime's own policy loss: for
    `--custom-pg-loss-reducer-function-path`.

    The constant is max_length of the recipe in PREFKERN_RECIPE, such as "dr_grpo:max_length=4096": slime passes no arguments.
    """
    scale = getattr(chosen(), "max_length", None)
    if chosen().name != "dr_grpo" or scale is None:
        raise ValueError(
            f"{RECIPE_VARIABLE} is {os.environ.get(RECIPE_VARIABLE)!r}; this reducer is for dr_grpo:max_length=<tokens>, the "
            "others have slime's own"
        )
    if calculate_per_token_loss:
        raise ValueError("--calculate-per-token-loss is set; Dr. GRPO divides by a constant per completion, so leave it out")
    parts = [
        _slice(torch.as_tensor(m), total, n) for m, total, n in zip(loss_masks, total_lengths, response_lengths, strict=True)
    ]
    mask = torch.cat(parts).bool()
    return lambda x: torch.where(mask, x, 0.0).sum() / scale
