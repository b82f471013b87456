"""PyTorch as it is usually written, eager and compiled."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.bench.peers.base import (
    ADVANTAGE_EPS,
    BETA,
    DIFFUSION_BETA,
    DUAL_CLIP,
    EPS_HIGH,
    EPS_LOW,
    GAMMA,
    LAMBDA,
    LIST_OBJECTIVES,
    PAIR_BETA,
    PAIR_OBJECTIVES,
    SIMPO_BETA,
    SIMPO_GAMMA,
    TAU_NEG,
    TAU_POS,
    TOP_FRACTION,
    VIRTUAL_REWARD,
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
from prefkern.bench.peers.objectives import TwoStep
from prefkern.bench.timing import free_bytes


class Eager(TwoStep):
    """The usual plain PyTorch."""

    name = "eager"
    about = "plain PyTorch: log_softmax, gather, exp; index_add over groups; bincount; torch.quantile"

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._of_log_softmax(F.log_softmax(_wide(hidden @ weight.T), dim=-1), targets, entropy)

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._of_log_softmax(F.log_softmax(_wide(logits), dim=-1), targets, entropy)

    @staticmethod
    def _of_log_softmax(log_p: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        logp = log_p.gather(1, targets[:, None]).squeeze(1)
        return logp, -(log_p.exp() * log_p).sum(-1) if entropy else None

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None, estimator: str) -> Tensor:
        if size is not None:
            return _advantages_of_view(rewards.view(-1, size, *rewards.shape[1:]), estimator).view(len(rewards))
        if estimator != "grpo":
            raise Unavailable("written for groups one behind the other")
        ids, index = torch.unique(group, return_inverse=True)
        zeros = rewards.new_zeros(len(ids))
        count = zeros.index_add(0, index, torch.ones_like(rewards))
        centred = rewards - (zeros.index_add(0, index, rewards) / count)[index]
        variance = zeros.index_add(0, index, centred.square()) / (count - 1).clamp_min(1)
        return centred / (variance.sqrt()[index] + ADVANTAGE_EPS)

    def group_reduce(self, values: Tensor, group: Tensor, size: int | None, reduce: Reduction) -> Tensor:
        if size is not None:
            v = values.view(-1, size)
            result = v.sum(1, keepdim=True) if reduce == "sum" else v.logsumexp(1, keepdim=True)
            return result.expand(-1, size).reshape(-1)
        ids, index = torch.unique(group, return_inverse=True)
        zeros = values.new_zeros(len(ids))
        if reduce == "sum":
            return zeros.index_add(0, index, values)[index]
        highest = zeros.scatter_reduce(0, index, values.detach(), "amax", include_self=False)
        return (highest + zeros.index_add(0, index, (values - highest[index]).exp()).log())[index]

    def conflict_runs(self, tokens: Tensor, advantages: Tensor, mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        """Counts of every token at every place, once for each sign: two tables of L x V numbers per direction."""
        rows, length = tokens.shape
        # bincount counts in int64; at the same time the comparisons of both tables with zero are held
        needed, free = length * vocab * (8 + 1 + 1), free_bytes(tokens.device.type)
        if free is not None and needed > free / 2:
            raise Unavailable(f"needs {needed / 2**30:.1f} GiB, more than half of the free {free / 2**30:.1f} GiB")
        place = torch.arange(length, device=tokens.device).expand(rows, length)
        from_end = mask.sum(1, keepdim=True) - 1 - place  # negative behind the last token
        backwards = tokens.gather(1, from_end.clamp_min(0))  # in the other direction the mask lies as it did
        return self._leading_run(tokens, place, advantages, mask, vocab), self._leading_run(
            backwards, place, advantages, mask, vocab
        )

    @staticmethod
    def _leading_run(tokens: Tensor, place: Tensor, advantages: Tensor, mask: Tensor, vocab: int) -> Tensor:
        cell = place * vocab + tokens
        positive, negative = (
            torch.bincount(cell[mask & sign[:, None]], minlength=tokens.shape[1] * vocab) > 0
            for sign in (advantages > 0, advantages < 0)
        )
        conflict = (positive & negative)[cell] & mask & (advantages != 0)[:, None]
        return conflict.long().cumprod(1).sum(1)

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
        a, m = advantages[:, None], mask.to(logp.dtype)
        lengths = m.sum(1)
        tokens, sequences = lengths.sum(), (lengths > 0).sum()
        d = logp - old_logp
        if objective == "gspo":
            ratio = ((d * m).sum(1) / lengths.clamp_min(1))[:, None].exp().expand_as(d)
        else:
            ratio = d.clamp(-20.0, 20.0).exp()
        loss, low, high, dual = self._policy_term(logp, ratio, a, objective)
        if ref_logp is not None:
            to_ref = ref_logp - logp
            k3 = to_ref.exp() - to_ref - 1
            loss = loss + BETA * k3
        by_sequence = objective == "gspo"
        total = ((loss * m).sum(1) / (lengths + 1e-8)).sum() / sequences if by_sequence else (loss * m).sum() / tokens
        with torch.no_grad():
            zero = tokens.new_zeros(())
            fractions = {"low": low, "high": high, "dual": dual}
            metrics = {
                f"clip_fraction_{name}": zero if clipped is None else (clipped * m).sum() / tokens
                for name, clipped in fractions.items()
            } | {
                "ratio_mean": (ratio * m).sum() / tokens,
                "ratio_min": ratio.masked_fill(~mask, torch.inf).min(),
                "ratio_max": ratio.masked_fill(~mask, -torch.inf).max(),
                "approx_kl": ((d.exp() - 1 - d) * m).sum() / tokens,
                "kl": zero if ref_logp is None else (k3 * m).sum() / tokens,
                "entropy": zero if entropy is None else (entropy * m).sum() / tokens,
                "tokens": tokens,
                "sequences": sequences,
            }
        return total, metrics

    @staticmethod
    def _policy_term(
        logp: Tensor, ratio: Tensor, a: Tensor, objective: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The loss of each token, and where the lower, the upper and the dual bound hold it."""
        if objective == "sapo":
            tau = torch.where(a > 0, TAU_POS, TAU_NEG)
            return -a * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), None, None, None
        low, high = ratio < 1 - EPS_LOW, ratio > 1 + EPS_HIGH
        bounded = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
        if objective == "cispo":
            return -a * bounded.detach() * logp, low, high, None
        negative = a < 0
        low, high = low & negative, high & (a > 0)
        clipped = torch.maximum(-a * ratio, -a * bounded)
        if objective == "gspo":
            return clipped, low, high, None
        dual = negative & (ratio > DUAL_CLIP)
        return torch.where(negative, torch.minimum(clipped, -a * DUAL_CLIP), clipped), low, high, dual

    def preference_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        refs: tuple[Tensor, ...] | None,
        lengths: tuple[Tensor, ...] | None,
        objective: str,
    ) -> LossAndMetrics:
        """As TRL writes it: log-ratios, a loss per pair, its mean, and four metrics."""
        x_w, x_l = (chosen, rejected) if refs is None else (chosen - refs[0], rejected - refs[1])
        if lengths is not None:
            x_w, x_l = x_w / lengths[0], x_l / lengths[1]
        beta = SIMPO_BETA if objective == "simpo" else PAIR_BETA
        z = beta * (x_w - x_l)
        if objective == "exo":
            e = PAIR_OBJECTIVES[objective].options["label_smoothing"]
            log_q, log_p = F.logsigmoid(z), F.logsigmoid(-z)
            losses = log_q.exp() * (log_q - math.log1p(-e)) + log_p.exp() * (log_p - math.log(e))
        else:
            losses = -F.logsigmoid(z - SIMPO_GAMMA if objective == "simpo" else z)
        with torch.no_grad():
            rewards = beta * x_w, beta * x_l
            metrics = {
                "chosen_reward": rewards[0].mean(), "rejected_reward": rewards[1].mean(),
                "reward_margin": (rewards[0] - rewards[1]).mean(), "accuracy": (rewards[0] > rewards[1]).to(z.dtype).mean(),
            }  # fmt: skip
        return losses.mean(), metrics

    def diffusion_pref_loss(
        self, pred_w: Tensor, pred_l: Tensor, target: Tensor, ref_w: Tensor, ref_l: Tensor
    ) -> LossAndMetrics:
        """As training scripts write it: errors in float32, means over the elements, differences of those."""
        dims = tuple(range(1, target.dim()))
        t = _wide(target)

        def error(pred: Tensor) -> Tensor:
            return (_wide(pred) - t).pow(2).mean(dims)

        with torch.no_grad():
            ref_gap = error(ref_w) - error(ref_l)
        margin = -0.5 * DIFFUSION_BETA * ((error(pred_w) - error(pred_l)) - ref_gap)
        with torch.no_grad():
            metrics = {"margin": margin.mean(), "accuracy": (margin > 0).to(margin.dtype).mean()}
        return -F.logsigmoid(margin).mean(), metrics

    def listwise_loss(self, scores: Tensor, labels: Tensor, objective: str) -> Tensor:
        """Without a loop: all pairs at once, or logcumsumexp over the sorted list."""
        options = LIST_OBJECTIVES[objective]
        u = scores * options.get("beta", 1.0)
        if objective == "plackett_luce":
            ranked = u.gather(1, labels.argsort(1, descending=True))
            return -(ranked - ranked.flip(1).logcumsumexp(1).flip(1)).sum(1).mean()
        if objective == "exo":
            log_p, log_t = u.log_softmax(1), labels.log_softmax(1)
            return (log_p.exp() * (log_p - log_t)).sum(1).mean()
        rank = labels.argsort(1, descending=True).argsort(1).to(u.dtype) + 1
        gain, discount = labels.exp2() - 1, 1 / torch.log1p(rank)
        weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
        losses = -F.logsigmoid(u[:, :, None] - u[:, None, :]) * weight
        return torch.where(labels[:, :, None] > labels[:, None, :], losses, 0.0).sum((1, 2)).mean()

    def top_quantile_mask(self, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        if rule == "trl":
            return (values >= torch.quantile(values[mask], 1 - TOP_FRACTION)) & mask
        count = math.ceil(TOP_FRACTION * int(mask.sum()))
        top = values.masked_fill(~mask, -torch.inf).view(-1).topk(count).indices
        return torch.zeros_like(mask).view(-1).index_fill(0, top, True).view_as(mask)

    def sequence_sum(self, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return (values if mask is None else values.masked_fill(~mask, 0.0)).sum(1)
        rows = len(cu_seqlens) - 1
        row = torch.repeat_interleave(torch.arange(rows, device=values.device), cu_seqlens.diff())
        return values.new_zeros(rows).index_add(0, row, values)

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Over the columns from the last to the first; the mask is a run of ones in front."""
        r, v, m = (x * mask for x in (rewards, values, mask.to(values.dtype)))
        following = F.pad(v, (0, 1))[:, 1:]
        delta = r + GAMMA * following - v
        carry = values.new_zeros(len(values))
        columns = []
        for t in range(values.shape[1] - 1, -1, -1):
            carry = delta[:, t] + GAMMA * LAMBDA * carry
            columns.append(carry)
        advantages = torch.stack(columns[::-1], dim=1) * m
        return advantages, (advantages + v) * m

    def seeded_normal_combine(self, seed: int, weights: Tensor, n: int) -> Tensor:
        """A row at a time: no more memory than two rows."""
        generator = torch.Generator(weights.device).manual_seed(seed)
        total = torch.zeros(n, dtype=weights.dtype, device=weights.device)
        for weight in weights.tolist():
            total.add_(torch.randn(n, generator=generator, dtype=weights.dtype, device=weights.device), alpha=weight)
        return total

    def beta_thompson_topk(self, alpha: Tensor, beta: Tensor, k: int, mode: ThompsonMode) -> tuple[Tensor, Tensor]:
        a, b = alpha + 1, beta + 1
        if mode == "thompson":
            torch.manual_seed(0)
            p = torch.distributions.Beta(a, b, validate_args=False).sample()
            utilities = p * (1 - p).square()
        else:
            s = a + b
            utilities = a * b * (b + 1) / (s * (s + 1) * (s + 2))
        values, ids = utilities.topk(k)
        return ids, values

    def knapsack_allocate(self, utilities: Tensor, total: int, b_min: int, method: KnapsackMethod) -> Tensor:
        """The programme's sums of one prompt at once, a row per sum; the greedy one rollout by rollout."""
        table, (n, choices) = utilities.double(), utilities.shape
        surplus = min(total - n * b_min, n * (choices - 1))
        extra = torch.zeros(n, dtype=torch.int64)
        if method == "greedy":
            gains = F.pad(table.diff(dim=1), (0, 1), value=-math.inf)
            for _ in range(surplus):
                best = int(gains.gather(1, extra[:, None]).argmax())
                if gains[best, extra[best]] <= 0:
                    break
                extra[best] += 1
            return extra + b_min
        best_sums, chosen = table.new_zeros(surplus + 1), []
        for row in table.flip(1):
            rows = F.pad(best_sums, (choices - 1, 0), value=-math.inf).unfold(0, choices, 1) + row
            best_sums, last = rows.max(1)
            chosen.append(choices - 1 - last)
        for i in range(n - 1, -1, -1):
            extra[i] = chosen[i][surplus]
            surplus -= int(extra[i])
        return extra + b_min

    def self_bleu(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        """Prompt by prompt: all n-grams by torch.unique, a table of how often each response has each, and of every column of
        it the largest two. Every response has an n-gram."""
        ends, result = cu_seqlens.tolist(), []
        for first, last in pairwise(cu_prompts.tolist()):
            rows = [ids[a:b] for a, b in pairwise(ends[first : last + 1])]
            logs = torch.zeros(len(rows), dtype=torch.float64)
            for n in (1, 2, 3):
                windows = [row.unfold(0, n, 1) for row in rows]
                counts = torch.tensor([len(w) for w in windows])
                grams, index = torch.unique(torch.cat(windows), dim=0, return_inverse=True)
                cell = torch.arange(len(rows)).repeat_interleave(counts) * len(grams) + index
                table = torch.bincount(cell, minlength=len(rows) * len(grams)).view(len(rows), -1)
                top, second = table.topk(2, dim=0).values
                matched = table.minimum(torch.where(table == top, second, top)).sum(1).double()
                if n == 1:
                    some = matched > 0
                logs += torch.where(matched > 0, matched, 0.1).div(counts).log() / 3
            length = torch.tensor([len(row) for row in rows])
            apart = (length - length[:, None]).abs() * 2 * length.max() + length
            nearest = length[apart.fill_diagonal_(torch.iinfo(torch.int64).max).argmin(1)]
            brevity = torch.where(length > nearest, 1.0, (1 - nearest / length.double()).exp())
            result.append(torch.where(some, brevity * logs.exp(), 0.0).mean())
        return torch.stack(result)

    def edit_distance(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        """Row by row of the tables of all pairs at once, a row's running minimum by cummin. Responses are equally long, and
        prompts have equally many."""
        prompts, responses = len(cu_prompts) - 1, int(cu_prompts[1])
        rows = ids.view(prompts, responses, -1)
        i, j = torch.triu_indices(responses, responses, 1)
        a, b = rows[:, i], rows[:, j]
        place = torch.arange(rows.shape[-1] + 1, dtype=torch.float32)
        row = place.expand(*a.shape[:2], -1)
        for t in range(a.shape[-1]):
            within = torch.minimum(row[..., 1:] + 1, row[..., :-1] + (b != a[..., t : t + 1]))
            row = (F.pad(within, (1, 0), value=t + 1.0) - place).cummin(-1).values + place
        return row[..., -1].double().mean(1)

    def greedy_select(self, emb: Tensor, types: Tensor, seeds: Tensor, quotas: tuple[int, ...], reduce: str) -> Tensor:
        """All seeds at once: per step a batched product, and the argmin of what is left."""
        unit = emb / emb.norm(dim=-1, keepdim=True)
        fold = torch.maximum if reduce == "max" else torch.minimum
        each = torch.arange(len(seeds), device=emb.device)
        room = torch.tensor(quotas, device=emb.device).repeat(len(seeds), 1)
        taken = torch.zeros_like(types, dtype=torch.bool)
        last, chosen, scores = seeds, [seeds], None
        for _ in range(sum(quotas) - 1):
            taken[each, last] = True
            room[each, types[each, last]] -= 1
            cosines = (unit @ unit[each, last].unsqueeze(-1)).squeeze(-1)
            scores = cosines if scores is None else fold(scores, cosines)
            closed = taken | (room.gather(1, types) == 0)
            last = scores.masked_fill(closed, torch.inf).argmin(1)
            chosen.append(last)
        return torch.stack(chosen, 1)

    def gp_unique_posterior(
        self, L: Tensor, a: Tensor, U: Tensor, X: Tensor, kernel: GpKernelName, length: float
    ) -> tuple[Tensor, Tensor]:
        """In float64, as everybody; the kernel matrix by a product."""
        u, x = U.double() / length, X.double() / length
        r2 = (u.square().sum(1, keepdim=True) + x.square().sum(1) - 2 * (u @ x.T)).clamp_min(0)
        if kernel == "rbf":
            k = (-0.5 * r2).exp()
        else:
            s = (5 * r2).sqrt()
            k = (1 + s + s.square() / 3) * (-s).exp()
        v = torch.linalg.solve_triangular(L, k, upper=False)
        return a.double() @ v, (1 - v.square().sum(0)).clamp_min(0)

    def chol_append(self, factor: Tensor, row: Tensor, matrix: Tensor) -> Tensor:
        """The whole matrix anew."""
        return torch.linalg.cholesky(matrix)[-1]

    def lpg_inner_loss(self, actions: Tensor, probs: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor) -> Tensor:
        log_pi = (probs.gather(-1, actions[:, None]).squeeze(-1) + 1e-8).log()
        kl = (y * ((y + 1e-8).log() - (y_hat + 1e-8).log())).sum(-1)
        return (log_pi * pi_hat).mean() + 0.5 * kl.mean()

    def reverse_gru_reset(
        self, x: Tensor, done: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_n: Tensor
    ) -> Tensor:
        """A loop over the steps from the last to the first."""
        from_x = F.linear(x, weight_ih, bias_ih)
        h, states = x.new_zeros(len(x), weight_hh.shape[1]), []
        keep = (~done).to(x.dtype)
        for t in range(x.shape[1] - 1, -1, -1):
            h = h * keep[:, t, None]
            x_r, x_z, x_n = from_x[:, t].chunk(3, -1)
            h_r, h_z, h_n = (h @ weight_hh.T).chunk(3, -1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            h = torch.lerp(torch.tanh(x_n + r * (h_n + bias_n)), h, z)
            states.append(h)
        return torch.stack(states[::-1], 1)


class Compile(Peer):
    """torch.compile of the eager definitions, static shapes."""

    name = "compile"
    about = "torch.compile of eager, static shapes"

    def __init__(self) -> None:
        torch.compiler.reset()  # each case compiles its own, and none meets the recompilation limit
        eager = Eager()
        self._linear = torch.compile(eager.linear_logprobs, dynamic=False)
        self._logits = torch.compile(eager.logits_logprobs, dynamic=False)
        self._advantages = torch.compile(eager.group_advantages, dynamic=False)
        self._reduce = torch.compile(eager.group_reduce, dynamic=False)
        self._policy = torch.compile(eager.policy_loss, dynamic=False)
        self._preference = torch.compile(eager.preference_loss, dynamic=False)
        self._listwise = torch.compile(eager.listwise_loss, dynamic=False)
        self._diffusion = torch.compile(eager.diffusion_pref_loss, dynamic=False)
        self._linear_policy = torch.compile(eager.linear_policy_loss, dynamic=False)
        self._linear_preference = torch.compile(eager.linear_preference_loss, dynamic=False)
        self._linear_unpaired = torch.compile(eager.linear_unpaired_loss, dynamic=False)
        self._sequence_sum = torch.compile(eager.sequence_sum, dynamic=False)

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._linear(hidden, weight, targets, entropy)

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._logits(logits, targets, entropy)

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None, estimator: str) -> Tensor:
        if size is None:
            raise Unavailable("torch.unique is not compiled")
        return self._advantages(rewards, group, size, estimator)

    def group_reduce(self, values: Tensor, group: Tensor, size: int | None, reduce: Reduction) -> Tensor:
        if size is None:
            raise Unavailable("torch.unique is not compiled")
        return self._reduce(values, group, size, reduce)

    def conflict_runs(self, tokens: Tensor, advantages: Tensor, mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        raise Unavailable("torch.bincount is not compiled")

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
        return self._policy(logp, old_logp, advantages, mask, ref_logp, entropy, objective)

    def preference_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        refs: tuple[Tensor, ...] | None,
        lengths: tuple[Tensor, ...] | None,
        objective: str,
    ) -> LossAndMetrics:
        return self._preference(chosen, rejected, refs, lengths, objective)

    def diffusion_pref_loss(
        self, pred_w: Tensor, pred_l: Tensor, target: Tensor, ref_w: Tensor, ref_l: Tensor
    ) -> LossAndMetrics:
        return self._diffusion(pred_w, pred_l, target, ref_w, ref_l)

    def listwise_loss(self, scores: Tensor, labels: Tensor, objective: str) -> Tensor:
        return self._listwise(scores, labels, objective)

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
        return self._linear_policy(hidden, weight, targets, old_logp, ref_logp, advantages, token_weight, objective)

    def linear_preference_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor | None, objective: str
    ) -> Tensor:
        return self._linear_preference(hidden, weight, targets, ref_logp, objective)

    def linear_unpaired_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, desirable: Tensor
    ) -> Tensor:
        return self._linear_unpaired(hidden, weight, targets, ref_logp, desirable)

    def top_quantile_mask(self, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        raise Unavailable("the number of values depends on the mask, which is not compiled")

    def sequence_sum(self, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            raise Unavailable("the number of tokens depends on cu_seqlens, which is not compiled")
        return self._sequence_sum(values, mask, cu_seqlens)

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        raise Unavailable("a loop over every token would be unrolled")

    def self_bleu(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        raise Unavailable("torch.unique is not compiled")

    def edit_distance(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        raise Unavailable("a loop over every token would be unrolled")

    def greedy_select(self, emb: Tensor, types: Tensor, seeds: Tensor, quotas: tuple[int, ...], reduce: str) -> Tensor:
        raise Unavailable("a loop over every candidate would be unrolled")


def _advantages_of_view(r: Tensor, estimator: str) -> Tensor:
    """r: [groups, size], or [groups, size, rewards]."""
    virtual = torch.full_like(r[:, :1], VIRTUAL_REWARD)
    values = torch.cat([r, virtual], dim=1) if estimator == "ngrpo" else r
    centred = r - values.mean(1, keepdim=True)
    if estimator == "mad":
        return r.shape[1] * centred / (centred.abs().sum(1, keepdim=True) + ADVANTAGE_EPS)
    scaled = centred / (values.std(1, keepdim=True) + ADVANTAGE_EPS)
    if estimator != "gdpo":
        return scaled
    total = scaled.sum(-1)
    return (total - total.mean()) / (total.std() + ADVANTAGE_EPS)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
