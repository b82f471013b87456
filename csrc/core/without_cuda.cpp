// The CUDA entry points of a build without a CUDA compiler: they report it, so that a CUDA tensor gets a clear error.
#if defined(PREFKERN_NO_CUDA)
#include "advantages/group_stats.h"
#include "advantages/masked_pairs.h"
#include "advantages/moments.h"
#include "advantages/question_weights.h"
#include "conflicts/divergence.h"
#include "conflicts/runs.h"
#include "core/cuda_runtime.h"
#include "diversity/greedy_select.h"
#include "diffusion/clean_latents.h"
#include "diffusion/pair_errors.h"
#include "filters/select.h"
#include "gaussian/chol.h"
#include "gaussian/gp_posterior.h"
#include "groups/group_folds.h"
#include "groups/pair_walk.h"
#include "logprobs/active_rows.h"
#include "logprobs/compact_rows.h"
#include "logprobs/logits_edit.h"
#include "logprobs/logits_fold.h"
#include "logprobs/shard_merge.h"
#include "logprobs/tile_fold.h"
#include "policy/importance.h"
#include "policy/token_loss.h"
#include "preference/pair_loss.h"
#include "sequence/pooling.h"
#include "preference/posterior.h"
#include "lists/group_preference.h"
#include "lists/listwise.h"
#include "lists/row_loss.h"
#include "lists/skew.h"
#include "sampling/seeded_normal.h"
#include "sampling/beta_thompson.h"
#include "meta/gru.h"
#include "meta/inner_loss.h"
#include "sequence/returns.h"
#include "sequence/sequence_sums.h"

namespace prefkern {
const char* cuda_architectures() { return ""; }
int cuda_runtime_version() { return 0; }
const char* cuda_error_string(int) {
  return "prefkern was built without CUDA; install nvcc and rebuild, or move the tensors to the CPU";
}
int cuda_fold_logits(const FoldArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_grad_logits(const GradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_grad_bias(const GradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_round_logits(const RoundArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_keep_logits(const KeepArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_kept_upstream(const KeptUpstreamArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_active_targets(const ActiveTargetsArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_compact(const CompactArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_gather_rows(const GatherRowsArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_gather_vectors(const GatherVectorsArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_scatter_rows(const ScatterRowsArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_merge_tiles(const TileMergeArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_merge_shards(const ShardMergeArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_group_advantages(const GroupArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_conflict_runs(const ConflictArgs<int32_t>&, void*) { return kBuiltWithoutCuda; }
int cuda_conflict_runs(const ConflictArgs<int64_t>&, void*) { return kBuiltWithoutCuda; }
int cuda_conflict_weights(const ConflictWeightArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_first_divergence(const DivergenceArgs<int32_t>&, void*) { return kBuiltWithoutCuda; }
int cuda_first_divergence(const DivergenceArgs<int64_t>&, void*) { return kBuiltWithoutCuda; }
int cuda_quantile(const SelectArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_keep_largest(const SelectArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_keep_from(const SelectArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_gp_posterior(const GpPosteriorArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_chol_append(const CholArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_chol_rank1(const CholArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_batch_moments(const MomentsArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_merge_moments(const MergeArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_batch_normalize(const BatchNormalizeArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_question_weights(const QuestionArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_masked_pairs(const MaskedPairArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_policy_loss(const PolicyArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_policy_loss_backward(const PolicyGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_preference_loss(const PreferenceArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_preference_loss_backward(const PreferenceGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_label_posterior(const PosteriorArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_sequence_sums(const SequenceSumArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_sequence_sums_backward(const SequenceSumArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_pool(const PoolArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_pool_backward(const PoolArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_returns(const ReturnsArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_segmented_returns(const SegmentedArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_seeded_normal(const NormalArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_philox_words(const PhiloxArgs&, void*) { return kBuiltWithoutCuda; }
int cuda_group_reduce(const GroupReduceArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_group_normalize(const NormalizeArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_group_normalize_backward(const NormalizeGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_level_pairs(const PairArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_level_pairs_backward(const PairGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_importance_weights(const WeightArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_off_policy_mask(const OffPolicyArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_listwise(const ListArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_group_preference(const GroupPreferenceArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_skew(const SkewArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_skew_means(const SkewMeansArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_row_gradient(const RowGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_beta_thompson(const ThompsonArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_beta_update(const BetaUpdateArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_greedy_select(const GreedyArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_lpg_loss(const LpgArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_lpg_gradients(const LpgArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_lpg_second(const LpgArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_gru_forward_step(const GruArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_gru_backward_step(const GruArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_column_sums(const ColumnSumArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_diffusion_pairs(const DiffusionPairArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_diffusion_pairs_backward(const DiffusionGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_x0_loss(const X0LossArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_x0_loss_backward(const X0GradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_latent_step(const LatentStepArgs&, void*) { return kBuiltWithoutCuda; }
}  // namespace prefkern
#endif
