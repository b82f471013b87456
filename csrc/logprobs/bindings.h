// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "logprobs/active_rows.h"
#include "logprobs/logits_edit.h"
#include "logprobs/logits_fold.h"
#include "logprobs/row_gradients.h"
#include "logprobs/shard_merge.h"

namespace prefkern {

template <class S> void bind_logit_structs(py::module_& m, const std::string& suffix) {
  using Transform = LogitTransform<S>;
  Struct<Transform> t(m, "LogitTransform" + suffix);
  t.member("scale", &Transform::scale).member("softcap", &Transform::softcap).member("temperature", &Transform::temperature);
  t.member("bias", &Transform::bias);
  t.member("masked", &Transform::masked);
  t.member("row_temperature", &Transform::row_temperature);

  using Block = LogitBlock<S>;
  Struct<Block> b(m, "LogitBlock" + suffix);
  b.member("dtype", &Block::dtype)
      .member("rows", &Block::rows)
      .member("cols", &Block::cols)
      .member("first_col", &Block::first_col)
      .member("vocab", &Block::vocab)
      .member("ignore_index", &Block::ignore_index)
      .member("transform", &Block::transform);
  b.member("targets", &Block::targets);

  using Keep = KeepArgs<S>;
  Struct<Keep> k(m, "KeepArgs" + suffix);
  k.member("block", &Keep::block).member("kept", &Keep::kept);
  k.member("logits", &Keep::logits);
  k.member("mean_logit", &Keep::mean_logit);

  using KeptUpstream = KeptUpstreamArgs<S>;
  Struct<KeptUpstream> u(m, "KeptUpstreamArgs" + suffix);
  u.member("rows", &KeptUpstream::rows).member("kept", &KeptUpstream::kept);
  u.member("targets", &KeptUpstream::targets);
  u.member("g", &KeptUpstream::g);
  u.member("out", &KeptUpstream::out);

  using ActiveTargets = ActiveTargetsArgs<S>;
  Struct<ActiveTargets> at(m, "ActiveTargetsArgs" + suffix);
  at.member("rows", &ActiveTargets::rows).member("ignore_index", &ActiveTargets::ignore_index);
  at.member("targets", &ActiveTargets::targets);
  at.member("g_logp", &ActiveTargets::g_logp);
  at.member("g_entropy", &ActiveTargets::g_entropy);
  at.member("g_lse", &ActiveTargets::g_lse);
  at.member("out", &ActiveTargets::out);

  using Fold = FoldArgs<S>;
  Struct<Fold> f(m, "FoldArgs" + suffix);
  f.member("block", &Fold::block)
      .member("logits_map", &Fold::logits_map)
      .member("entropy", &Fold::entropy)
      .member("extra", &Fold::extra)
      .member("first", &Fold::first)
      .member("last", &Fold::last)
      .member("state_stride", &Fold::state_stride);
  f.member("logits", &Fold::logits);
  f.member("state", &Fold::state);
  f.member("logp", &Fold::logp);
  f.member("out_entropy", &Fold::out_entropy);
  f.member("lse", &Fold::lse);
  f.member("sum_sq_probs", &Fold::sum_sq_probs);
  f.member("mean_logit", &Fold::mean_logit);
  f.member("is_top1", &Fold::is_top1);
  f.member("row_max", &Fold::row_max);
  f.member("row_log2_sum", &Fold::row_log2_sum);

  Struct<ShardMergeArgs<S>> merge(m, "ShardMergeArgs" + suffix);
  merge.member("rows", &ShardMergeArgs<S>::rows);
  merge.member("shards", &ShardMergeArgs<S>::shards);
  merge.member("shard_stride", &ShardMergeArgs<S>::shard_stride);

  using Grad = GradArgs<S>;
  Struct<Grad> g(m, "GradArgs" + suffix);
  g.member("block", &Grad::block)
      .member("logits_map", &Grad::logits_map)
      .member("grad_dtype", &Grad::grad_dtype)
      .member("grad_map", &Grad::grad_map)
      .member("add_to_bias", &Grad::add_to_bias);
  g.member("logits", &Grad::logits);
  g.member("grad", &Grad::grad);
  g.member("row_max", &Grad::row_max);
  g.member("row_log2_sum", &Grad::row_log2_sum);
  g.member("entropy", &Grad::entropy);
  g.member("g_logp", &Grad::g_logp);
  g.member("g_entropy", &Grad::g_entropy);
  g.member("g_lse", &Grad::g_lse);
  g.member("d_bias", &Grad::d_bias);
}

inline void bind_logprobs(py::module_& m) {
  Struct<KeptIds> k(m, "KeptIds");
  k.member("wide", &KeptIds::wide).member("count", &KeptIds::count);
  k.member("begin", &KeptIds::begin);
  k.member("end", &KeptIds::end);
  k.member("ids", &KeptIds::ids);
  bind_logit_structs<float>(m, "");
  bind_logit_structs<double>(m, "64");

  Struct<RoundArgs> r(m, "RoundArgs");
  r.member("rows", &RoundArgs::rows).member("cols", &RoundArgs::cols).member("to", &RoundArgs::to);
  r.member("logits", &RoundArgs::logits);
  r.member("bias", &RoundArgs::bias);
}

inline void bind_logprobs_cpu(py::module_& m) {
  bind_cpu<void, FoldArgs<float>>(m, "cpu_fold_logits", &cpu_fold_logits);
  bind_cpu<void, FoldArgs<double>>(m, "cpu_fold_logits64", &cpu_fold_logits);
  bind_cpu<void, GradArgs<float>>(m, "cpu_grad_logits", &cpu_grad_logits);
  bind_cpu<void, GradArgs<double>>(m, "cpu_grad_logits64", &cpu_grad_logits);
  bind_cpu<void, RoundArgs>(m, "cpu_round_logits", &cpu_round_logits);
  bind_cpu<void, KeepArgs<float>>(m, "cpu_keep_logits", &cpu_keep_logits);
  bind_cpu<void, KeepArgs<double>>(m, "cpu_keep_logits64", &cpu_keep_logits);
  bind_cpu<void, KeptUpstreamArgs<float>>(m, "cpu_kept_upstream", &cpu_kept_upstream);
  bind_cpu<void, KeptUpstreamArgs<double>>(m, "cpu_kept_upstream64", &cpu_kept_upstream);
  bind_cpu<void, ActiveTargetsArgs<float>>(m, "cpu_active_targets", &cpu_active_targets);
  bind_cpu<void, ActiveTargetsArgs<double>>(m, "cpu_active_targets64", &cpu_active_targets);
  bind_cpu<void, ShardMergeArgs<float>>(m, "cpu_merge_shards", &cpu_merge_shards);
  bind_cpu<void, ShardMergeArgs<double>>(m, "cpu_merge_shards64", &cpu_merge_shards);
}

inline void bind_logprobs_cuda(py::module_& m) {
  bind_cuda(m, "cuda_fold_logits", &cuda_fold_logits);
  bind_cuda(m, "cuda_grad_logits", &cuda_grad_logits);
  bind_cuda(m, "cuda_grad_bias", &cuda_grad_bias);
  bind_cuda(m, "cuda_round_logits", &cuda_round_logits);
  bind_cuda(m, "cuda_keep_logits", &cuda_keep_logits);
  bind_cuda(m, "cuda_kept_upstream", &cuda_kept_upstream);
  bind_cuda(m, "cuda_active_targets", &cuda_active_targets);
  bind_cuda(m, "cuda_merge_shards", &cuda_merge_shards);
}

}  // namespace prefkern
