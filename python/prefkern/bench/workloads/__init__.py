"""What is run for each op: inputs, the calls of every peer, the floor, and how far the results are from float64.

The floor is the least that an implementation of the same kind has to do, in plain PyTorch with buffers made before:

    linear_logprobs, linear_policy_loss, linear_preference_loss, linear_unpaired_loss
                      the bare torch.mm products, in the type of the inputs or in float32 where that is quicker: one forward;
                      three with backward, two if the weight is frozen; with a fifth of the rows active 1 + 2 / 5. Beside it,
                      as "floor-recompute", one more: linear_logprobs knows no gradient in its forward
    logits_logprobs   the fastest plain read of the logits; with backward two reads and one write
    conflict_runs, self_bleu, edit_distance
                      a copy of the tokens
    group_advantages, group_reduce, policy_loss, preference_loss, listwise_loss, top_quantile_mask,
    sequence_sum, gae, beta_thompson_topk, knapsack_allocate, greedy_select, lpg_inner_loss
                      a copy of the inputs
    seeded_normal_combine
                      a copy of the result
    gp_unique_posterior, chol_append
                      the triangular solution, of a kernel matrix that is there already
    reverse_gru_reset the products with the state
    diffusion_pref_loss
                      a copy of the five tensors, which moves as many bytes; of the forward alone the fastest plain read
    overhead          x + 1 on a tiny tensor; all on one thread, since waking the others is not what is asked for
"""

from prefkern.bench.workloads.advantages import AdvantagesWorkload
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, fastest_read
from prefkern.bench.workloads.conflicts import ConflictRunsWorkload
from prefkern.bench.workloads.diffusion import DiffusionPairWorkload
from prefkern.bench.workloads.diversity import EditDistanceWorkload, GreedySelectWorkload, SelfBleuWorkload
from prefkern.bench.workloads.filters import TopQuantileWorkload
from prefkern.bench.workloads.gaussian import CholAppendWorkload, GpPosteriorWorkload
from prefkern.bench.workloads.groups import GroupReduceWorkload
from prefkern.bench.workloads.logprobs import LinearWorkload, LogitsWorkload
from prefkern.bench.workloads.losses import LinearPolicyWorkload, LinearPreferenceWorkload, LinearUnpairedWorkload
from prefkern.bench.workloads.meta import InnerLossWorkload, ReverseGruWorkload
from prefkern.bench.workloads.overhead import OverheadWorkload
from prefkern.bench.workloads.policy import PolicyWorkload
from prefkern.bench.workloads.preference import ListwiseWorkload, PreferenceWorkload
from prefkern.bench.workloads.sampling import SeededNormalWorkload
from prefkern.bench.workloads.sequence import GaeWorkload, SequenceSumWorkload
from prefkern.bench.workloads.thompson import KnapsackWorkload, ThompsonWorkload

WORKLOADS: dict[str, type[Workload]] = {
    "linear_logprobs": LinearWorkload,
    "logits_logprobs": LogitsWorkload,
    "group_advantages": AdvantagesWorkload,
    "group_reduce": GroupReduceWorkload,
    "conflict_runs": ConflictRunsWorkload,
    "policy_loss": PolicyWorkload,
    "preference_loss": PreferenceWorkload,
    "listwise_loss": ListwiseWorkload,
    "diffusion_pref_loss": DiffusionPairWorkload,
    "linear_policy_loss": LinearPolicyWorkload,
    "linear_preference_loss": LinearPreferenceWorkload,
    "linear_unpaired_loss": LinearUnpairedWorkload,
    "top_quantile_mask": TopQuantileWorkload,
    "sequence_sum": SequenceSumWorkload,
    "gae": GaeWorkload,
    "seeded_normal_combine": SeededNormalWorkload,
    "beta_thompson_topk": ThompsonWorkload,
    "knapsack_allocate": KnapsackWorkload,
    "self_bleu": SelfBleuWorkload,
    "edit_distance": EditDistanceWorkload,
    "greedy_select": GreedySelectWorkload,
    "gp_unique_posterior": GpPosteriorWorkload,
    "chol_append": CholAppendWorkload,
    "lpg_inner_loss": InnerLossWorkload,
    "reverse_gru_reset": ReverseGruWorkload,
    "overhead": OverheadWorkload,
}

__all__ = ["WORKLOADS", "Errors", "Floor", "Outputs", "OutputsCall", "Workload", "fastest_read"]
