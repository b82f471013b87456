"""What a call costs before its kernel does anything."""

from __future__ import annotations

from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case, Shape
from prefkern.bench.workloads.advantages import AdvantagesWorkload
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload
from prefkern.bench.workloads.conflicts import ConflictRunsWorkload
from prefkern.bench.workloads.diffusion import DiffusionPairWorkload
from prefkern.bench.workloads.diversity import EditDistanceWorkload, GreedySelectWorkload, SelfBleuWorkload
from prefkern.bench.workloads.filters import TopQuantileWorkload
from prefkern.bench.workloads.gaussian import CholAppendWorkload, GpPosteriorWorkload
from prefkern.bench.workloads.groups import GroupReduceWorkload
from prefkern.bench.workloads.logprobs import LinearWorkload, LogitsWorkload
from prefkern.bench.workloads.losses import LinearPolicyWorkload, LinearPreferenceWorkload, LinearUnpairedWorkload
from prefkern.bench.workloads.meta import InnerLossWorkload, ReverseGruWorkload
from prefkern.bench.workloads.policy import PolicyWorkload
from prefkern.bench.workloads.preference import ListwiseWorkload, PreferenceWorkload
from prefkern.bench.workloads.sampling import SeededNormalWorkload
from prefkern.bench.workloads.sequence import GaeWorkload, SequenceSumWorkload
from prefkern.bench.workloads.thompson import KnapsackWorkload, ThompsonWorkload

# what is shown -> workload, op, shape, mode, variant of the workload
TINY: dict[str, tuple[type[Workload], str, Shape, str, str]] = {
    "linear_logprobs": (LinearWorkload, "linear_logprobs", (2, 16, 32), "fwd", "logp"),
    "logits_logprobs": (LogitsWorkload, "logits_logprobs", (2, 32), "fwd", "logp"),
    "group_advantages": (AdvantagesWorkload, "group_advantages", (16, 4), "fwd", "contiguous"),
    "group_reduce": (GroupReduceWorkload, "group_reduce", (16, 4), "fwd", "sum"),
    "conflict_runs": (ConflictRunsWorkload, "conflict_runs", (4, 8, 32), "fwd", "template"),
    "policy_loss": (PolicyWorkload, "policy_loss", (2, 8), "fwd", "clip"),
    "policy_loss 8x512": (PolicyWorkload, "policy_loss", (8, 512), "fwd", "clip+k3"),
    "policy_loss 8x512 bwd": (PolicyWorkload, "policy_loss", (8, 512), "bwd", "clip+k3"),
    "preference_loss": (PreferenceWorkload, "preference_loss", (64,), "fwd", "dpo"),
    "preference_loss bwd": (PreferenceWorkload, "preference_loss", (64,), "bwd", "dpo"),
    "listwise_loss": (ListwiseWorkload, "listwise_loss", (2, 4), "fwd", "lambda"),
    "linear_policy_loss": (LinearPolicyWorkload, "linear_policy_loss", (2, 2, 16, 32), "fwd", "grpo"),
    "linear_preference_loss": (LinearPreferenceWorkload, "linear_preference_loss", (1, 2, 16, 32), "fwd", "dpo"),
    "linear_unpaired_loss": (LinearUnpairedWorkload, "linear_unpaired_loss", (2, 2, 16, 32), "fwd", "kto"),
    "top_quantile_mask": (TopQuantileWorkload, "top_quantile_mask", (2, 8), "fwd", "trl"),
    "sequence_sum": (SequenceSumWorkload, "sequence_sum", (2, 8), "fwd", "padded"),
    "gae": (GaeWorkload, "gae", (2, 8), "fwd", "padded"),
    "diffusion_pref_loss": (DiffusionPairWorkload, "diffusion_pref_loss", (2, 4, 2, 2), "fwd", "sigmoid"),
    "gp_unique_posterior": (GpPosteriorWorkload, "gp_unique_posterior", (3, 4, 2), "fwd", "rbf"),
    "chol_append": (CholAppendWorkload, "chol_append", (3,), "fwd", "append"),
    "seeded_normal_combine": (SeededNormalWorkload, "seeded_normal_combine", (8, 2), "fwd", "sum"),
    "beta_thompson_topk": (ThompsonWorkload, "beta_thompson_topk", (16,), "fwd", "mean"),
    "knapsack_allocate": (KnapsackWorkload, "knapsack_allocate", (3, 4), "fwd", "greedy"),
    "self_bleu": (SelfBleuWorkload, "self_bleu", (1, 2, 8), "fwd", "1 to 3"),
    "edit_distance": (EditDistanceWorkload, "edit_distance", (1, 2, 8), "fwd", "tokens"),
    "greedy_select": (GreedySelectWorkload, "greedy_select", (1, 8, 4), "fwd", "min"),
    "lpg_inner_loss": (InnerLossWorkload, "lpg_inner_loss", (4, 2, 2), "fwd", "loss"),
    "reverse_gru_reset": (ReverseGruWorkload, "reverse_gru_reset", (2, 2, 4), "fwd", "states"),
}


class OverheadWorkload(Workload):
    """Every op on inputs so small that only the way to the kernel takes time."""

    variants = tuple(TINY)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.tiny = {
            name: workload(Case(op, shape, "fp32", mode), device) for name, (workload, op, shape, mode, _) in TINY.items()
        }

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return self.tiny[variant].call(peer, TINY[variant][-1])

    def floor(self) -> Floor:
        x = self.normal(4)
        return Floor("x + 1 on 4 numbers, one thread", lambda: x + 1)

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        return self.tiny[variant].errors(outputs, TINY[variant][-1])
