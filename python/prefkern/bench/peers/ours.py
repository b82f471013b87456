"""This library, in the ways in which it is measured."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from prefkern.bench.peers.base import (
    ADVANTAGE_EPS,
    DIFFUSION_BETA,
    ESTIMATORS,
    GAMMA,
    HEAD_OBJECTIVES,
    HEAD_PAIR_OPTIONS,
    HEAD_PAIR_SCALE,
    LAMBDA,
    LIST_OBJECTIVES,
    OBJECTIVES,
    PAIR_BETA,
    PAIR_OBJECTIVES,
    TOP_FRACTION,
    GpKernelName,
    KnapsackMethod,
    Logprobs,
    LossAndMetrics,
    Peer,
    Reduction,
    Rule,
    ThompsonMode,
    Unavailable,
)


class Prefkern(Peer):
    """This library, through its public functions."""

    name = "prefkern"
    about = "this library"

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        import prefkern

        out = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",) if entropy else ())
        return out.logp, out.entropy

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        import prefkern

        out = prefkern.logits_logprobs(logits, targets, outputs=("entropy",) if entropy else ())
        return out.logp, out.entropy

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None, estimator: str) -> Tensor:
        import prefkern

        return prefkern.group_advantages(rewards, group, eps=ADVANTAGE_EPS, **ESTIMATORS[estimator].options).advantages

    def group_reduce(self, values: Tensor, group: Tensor, size: int | None, reduce: Reduction) -> Tensor:
        import prefkern

        return prefkern.group_reduce(values, group, reduce=reduce)

    def conflict_runs(self, tokens: Tensor, advantages: Tensor, mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        import prefkern

        runs = prefkern.conflict_runs(tokens, advantages, self._one_group(len(tokens), tokens.device), mask)
        return runs.forward, runs.backward

    @staticmethod
    @lru_cache
    def _one_group(rows: int, device: torch.device) -> Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=device)

    def policy_loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logp: Tensor | None,
        entropy: Tensor | None,
        objective: str,
    ) -> LossAndMetrics:
        import prefkern

        options = OBJECTIVES[objective].options
        if ref_logp is None:
            return prefkern.policy_loss(logp, old_logp, advantages, mask, **options)
        return prefkern.policy_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, entropy=entropy, **options)

    def preference_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        refs: tuple[Tensor, ...] | None,
        lengths: tuple[Tensor, ...] | None,
        objective: str,
    ) -> LossAndMetrics:
        import prefkern

        options = PAIR_OBJECTIVES[objective].options
        if lengths is not None:
            options = options | {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        return prefkern.preference_loss(chosen, rejected, *(refs or ()), **options)

    def diffusion_pref_loss(
        self, pred_w: Tensor, pred_l: Tensor, target: Tensor, ref_w: Tensor, ref_l: Tensor
    ) -> LossAndMetrics:
        import prefkern

        return prefkern.diffusion_pref_loss(pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=DIFFUSION_BETA)

    def listwise_loss(self, scores: Tensor, labels: Tensor, objective: str) -> Tensor:
        import prefkern

        return prefkern.listwise_loss(scores, labels, **LIST_OBJECTIVES[objective]).loss

    def linear_policy_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor | None,
        advantages: Tensor,
        token_weight: Tensor | None,
        objective: str,
    ) -> Tensor:
        import prefkern

        head = HEAD_OBJECTIVES[objective]
        return prefkern.linear_policy_loss(
            hidden, weight, targets, old_logp, advantages, ref_logp=ref_logp, token_weight=token_weight,
            entropy_coef=head.entropy_coef, **head.options,
        ).loss  # fmt: skip

    def linear_preference_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor | None, objective: str
    ) -> Tensor:
        import prefkern

        options = HEAD_PAIR_OPTIONS[objective]
        loss = prefkern.linear_preference_loss(hidden, weight, targets, ref_logp=ref_logp, **options).loss
        return loss * HEAD_PAIR_SCALE[objective] if objective in HEAD_PAIR_SCALE else loss

    def linear_unpaired_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, desirable: Tensor
    ) -> Tensor:
        import prefkern

        return prefkern.linear_unpaired_loss(hidden, weight, targets, desirable, ref_logp=ref_logp, beta=PAIR_BETA).loss

    def top_quantile_mask(self, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        import prefkern

        return prefkern.top_quantile_mask(values, mask, fraction=TOP_FRACTION, rule=rule)

    def sequence_sum(self, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        import prefkern

        return prefkern.sequence_sum(values, mask, cu_seqlens=cu_seqlens)

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        import prefkern

        return prefkern.gae(rewards, values, mask, gamma=GAMMA, lam=LAMBDA)

    def seeded_normal_combine(self, seed: int, weights: Tensor, n: int) -> Tensor:
        import prefkern

        return prefkern.seeded_normal_combine(seed, weights, n)

    def beta_thompson_topk(self, alpha: Tensor, beta: Tensor, k: int, mode: ThompsonMode) -> tuple[Tensor, Tensor]:
        import prefkern

        ids, utilities, _ = prefkern.beta_thompson_topk(alpha, beta, k, mode=mode)
        return ids, utilities

    def knapsack_allocate(self, utilities: Tensor, total: int, b_min: int, method: KnapsackMethod) -> Tensor:
        import prefkern

        return prefkern.knapsack_allocate(utilities, total, b_min=b_min, method=method)

    def self_bleu(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        import prefkern

        return prefkern.self_bleu(ids, cu_seqlens=cu_seqlens, cu_prompts=cu_prompts)

    def edit_distance(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        import prefkern

        return prefkern.edit_distance(ids, cu_seqlens=cu_seqlens, cu_prompts=cu_prompts)

    def greedy_select(self, emb: Tensor, types: Tensor, seeds: Tensor, quotas: tuple[int, ...], reduce: str) -> Tensor:
        import prefkern

        return prefkern.greedy_select(emb, types, seeds, quotas, reduce="max" if reduce == "max" else "min")

    def gp_unique_posterior(
        self, L: Tensor, a: Tensor, U: Tensor, X: Tensor, kernel: GpKernelName, length: float
    ) -> tuple[Tensor, Tensor]:
        import prefkern

        return prefkern.gp_unique_posterior(L, a, U, X, kernel=kernel, length=length)

    def chol_append(self, factor: Tensor, row: Tensor, matrix: Tensor) -> Tensor:
        import prefkern

        prefkern.chol_append(factor, row, len(row) - 1)
        return factor[-1]

    def lpg_inner_loss(self, actions: Tensor, probs: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor) -> Tensor:
        import prefkern

        return prefkern.lpg_inner_loss(probs, actions, y, pi_hat, y_hat).loss

    def reverse_gru_reset(
        self, x: Tensor, done: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_n: Tensor
    ) -> Tensor:
        import prefkern

        return prefkern.reverse_gru_reset(x, done, weight_ih, weight_hh, bias_ih, bias_n)


class PrefkernTwoStep(Prefkern):
    """This library, head and loss one after the other: the logits are computed again in the backward."""

    name = "prefkern-two-step"
    about = "linear_logprobs, sequence_sum, and the loss behind them"

    def linear_policy_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor | None,
        advantages: Tensor,
        token_weight: Tensor | None,
        objective: str,
    ) -> Tensor:
        import prefkern

        head = HEAD_OBJECTIVES[objective]
        out = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",) if head.entropy_coef else ())
        options = {**head.options, "ref_logp": ref_logp, "token_weight": token_weight}
        loss = prefkern.policy_loss(out.logp, old_logp, advantages, **options).loss
        return loss if out.entropy is None else loss - head.entropy_coef * out.entropy.mean()

    def linear_preference_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor | None, objective: str
    ) -> Tensor:
        import prefkern

        options = dict(HEAD_PAIR_OPTIONS[objective])
        likelihood = options.pop("sft_weight", 0.0)
        logp = prefkern.linear_logprobs(hidden, weight, targets).logp
        chosen, rejected = prefkern.sequence_sum(logp, minus=ref_logp).chunk(2)
        if "average" in options:
            lengths = torch.full((len(chosen),), float(targets.shape[1]), device=hidden.device)
            options |= {"chosen_lengths": lengths, "rejected_lengths": lengths}
        loss = prefkern.preference_loss(chosen, rejected, **options).loss
        if likelihood:
            loss = loss - likelihood * chosen.mean() / targets.shape[1]
        return loss * HEAD_PAIR_SCALE[objective] if objective in HEAD_PAIR_SCALE else loss

    def linear_unpaired_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, desirable: Tensor
    ) -> Tensor:
        import prefkern

        logp = prefkern.linear_logprobs(hidden, weight, targets).logp
        return prefkern.unpaired_loss(prefkern.sequence_sum(logp, minus=ref_logp), None, desirable, beta=PAIR_BETA).loss


class _Saving(Prefkern):
    """This library's head, told what to save for the backward."""

    save = ""

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        import prefkern

        out = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",) if entropy else (), save=self.save)
        return out.logp, out.entropy


class PrefkernRecompute(_Saving):
    """This library computing the logits again in the backward."""

    name = "prefkern-recompute"
    about = 'this library, save="recompute"'
    save = "recompute"


class PrefkernKept(_Saving):
    """This library keeping the logits."""

    name = "prefkern-kept"
    about = 'this library, save="logits"'
    save = "logits"


class PrefkernU(_Saving):
    """This library keeping the gradient of each row's log-probability in its hidden state, where the weight is frozen."""

    name = "prefkern-u"
    about = 'this library, save="u"'
    save = "u"


class _Stage(Prefkern):
    """This library's head with one of its forwards on CUDA, whichever it would take by itself."""

    stage = ""

    def __init__(self) -> None:
        from prefkern import _C

        if not hasattr(_C, "set_cuda_forward"):
            raise Unavailable("this build has one forward on CUDA")

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        from prefkern import _C

        if not hidden.is_cuda:
            raise Unavailable("is for CUDA")
        before = _C.cuda_forward()
        _C.set_cuda_forward(self.stage)
        try:
            return super().linear_logprobs(hidden, weight, targets, entropy)
        finally:
            _C.set_cuda_forward(before)


class PrefkernStage1(_Stage):
    """Products by cuBLAS, and a kernel that reads the logits."""

    name = "prefkern-stage1"
    about = "this library, products by cuBLAS"
    stage = "stage1"


class PrefkernStage2(_Stage):
    """Logits folded while they are in registers."""

    name = "prefkern-stage2"
    about = "this library, logits folded in the product"
    stage = "stage2"


class PrefkernFp32(Prefkern):
    """This library with narrow inputs widened to float32 beforehand: what the narrow path must be worth."""

    name = "prefkern-fp32"
    about = "this library, given the same numbers in float32"


class PrefkernInplace(Prefkern):
    """This library overwriting the logits with their gradient, by the ops themselves: autograd would want a producer."""

    name = "prefkern-inplace"
    about = "this library, the gradient written over the logits"

    def logits_forward_backward(
        self, logits: Tensor, targets: Tensor, g_logp: Tensor, g_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ops, options = torch.ops.prefkern, (1.0, 0.0, 1.0, -100)
        outputs = 33 if g_entropy is not None else 32  # logprobs/ops.h: kSaveStats and kEntropy
        logp, entropy, _, _, _, _, stats = ops.logits_logprobs_fwd(logits, targets, None, *options, outputs, True)
        ops.logits_logprobs_backward_(g_logp, g_entropy, None, logits, targets, None, entropy, stats, *options)
        return logp, entropy if g_entropy is not None else None
