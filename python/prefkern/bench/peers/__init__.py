"""Whom prefkern is compared with: one small adapter for each library, or way of writing things.

An adapter imports its library when it is made, and raises `Unavailable` with the reason if that does not work or if the
library has no such op. Every method takes and returns tensors and is differentiable where the op is:

    linear_logprobs(hidden [N, H], weight [V, H], targets [N], entropy)     -> logp [N], entropy [N] or None
    logits_logprobs(logits [N, V], targets [N], entropy)                    -> logp [N], entropy [N] or None
    group_advantages(rewards [B] or [B, K], group [B], size, estimator)     -> advantages [B]
    group_reduce(values [B], group [B], size, reduce)                       -> [B]
    conflict_runs(tokens [G, L], advantages [G], mask, vocab)               -> forward [G], backward [G]
    policy_loss(logp, old_logp, advantages, mask, ref_logp, entropy, objective)   -> loss and metrics; [B, T], advantages [B]
    preference_loss(chosen [P], rejected [P], refs, lengths, objective)     -> loss and metrics
    listwise_loss(scores [B, K], labels [B, K], objective)                  -> loss
    diffusion_pref_loss(pred_w, pred_l, target, ref_w, ref_l)               -> loss and metrics; [B, ...] each
    linear_policy_loss(hidden [B, T, H], weight, targets, old_logp, ref_logp, advantages [B], token_weight, objective) -> loss
    linear_preference_loss(hidden [2P, T, H], weight, targets, ref_logp, objective)        -> loss
    linear_unpaired_loss(hidden [B, T, H], weight, targets, ref_logp, desirable [B])       -> KTO's loss
    top_quantile_mask(values [B, T], mask, rule)                            -> bool [B, T]
    sequence_sum(values [B, T] or [N], mask, cu_seqlens)                    -> [B]
    gae(rewards [B, T], values [B, T], mask)                                -> advantages, returns
    seeded_normal_combine(seed, weights [M], n)                             -> [n]; numbers of whatever generator
    beta_thompson_topk(alpha [M], beta [M], k, mode)                        -> ids [k], utilities [k]
    knapsack_allocate(utilities [n, K], total, b_min, method)               -> budgets [n]
    self_bleu(ids [N], cu_seqlens, cu_prompts), edit_distance(...)          -> [P]
    greedy_select(emb [Q, K, D], types [Q, K], seeds [Q], quotas, reduce)   -> chosen [Q, S]
    gp_unique_posterior(L [q, q], a [q], U [q, d], X [M, d], kernel, length) -> mean [M], var [M]
    chol_append(factor [q + 1, q + 1], row [q + 1], matrix)                 -> the last row of the factor of the matrix
    lpg_inner_loss(actions [N], probs [N, A], y [N, W], pi_hat [N], y_hat [N, W])           -> loss
    reverse_gru_reset(x [B, T, I], done, weight_ih, weight_hh, bias_ih, bias_n)             -> states [B, T, H]

`size` is the size of the groups when they lie one behind the other, None when they do not. `estimator` and `objective`
are names from `ESTIMATORS`, `OBJECTIVES` and, for pairs and lists, `PAIR_OBJECTIVES` and `LIST_OBJECTIVES`; for losses from
hidden states from `HEAD_OBJECTIVES` and `HEAD_PAIR_OPTIONS`.

base       the methods, the constants
ours       this library
plain      PyTorch as it is usually written, eager and compiled
python     Python loops
objectives losses in plain PyTorch behind whoever has a head
libraries  PyTorch's own fused functions, Liger, TRL, Cut Cross-Entropy, verl, QuACK
"""

from prefkern.bench.peers.base import (
    ESTIMATORS,
    HEAD_OBJECTIVES,
    HEAD_PAIR_OPTIONS,
    LIST_OBJECTIVES,
    OBJECTIVES,
    PAIR_OBJECTIVES,
    Estimator,
    GpKernelName,
    HeadObjective,
    KnapsackMethod,
    Logprobs,
    LossAndMetrics,
    Objective,
    PairObjective,
    Peer,
    Reduction,
    Rule,
    ThompsonMode,
    Unavailable,
)
from prefkern.bench.peers.libraries import Cce, Liger, Quack, Torch, TorchChunked, Trl, Verl
from prefkern.bench.peers.ours import (
    Prefkern,
    PrefkernFp32,
    PrefkernInplace,
    PrefkernKept,
    PrefkernRecompute,
    PrefkernStage1,
    PrefkernStage2,
    PrefkernTwoStep,
    PrefkernU,
)
from prefkern.bench.peers.plain import Compile, Eager
from prefkern.bench.peers.python import Python

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Prefkern,
        PrefkernFp32,
        PrefkernInplace,
        PrefkernTwoStep,
        PrefkernRecompute,
        PrefkernKept,
        PrefkernU,
        PrefkernStage1,
        PrefkernStage2,
        Eager,
        Compile,
        Torch,
        TorchChunked,
        Python,
        Liger,
        Trl,
        Cce,
        Verl,
        Quack,
    )
}
AGAINST = ("eager", "compile", "torch", "python", "liger", "trl", "cce")  # whom a run compares with if nobody is named
NAMEABLE = (*AGAINST, "torch-chunked", "verl", "quack")

__all__ = [
    "AGAINST",
    "ESTIMATORS",
    "HEAD_OBJECTIVES",
    "HEAD_PAIR_OPTIONS",
    "LIST_OBJECTIVES",
    "NAMEABLE",
    "OBJECTIVES",
    "PAIR_OBJECTIVES",
    "PEERS",
    "Cce",
    "Compile",
    "Eager",
    "Estimator",
    "GpKernelName",
    "HeadObjective",
    "KnapsackMethod",
    "Liger",
    "Logprobs",
    "LossAndMetrics",
    "Objective",
    "PairObjective",
    "Peer",
    "Prefkern",
    "PrefkernFp32",
    "PrefkernInplace",
    "PrefkernKept",
    "PrefkernRecompute",
    "PrefkernStage1",
    "PrefkernStage2",
    "PrefkernTwoStep",
    "PrefkernU",
    "Python",
    "Quack",
    "Reduction",
    "Rule",
    "ThompsonMode",
    "Torch",
    "TorchChunked",
    "Trl",
    "Unavailable",
    "Verl",
]
