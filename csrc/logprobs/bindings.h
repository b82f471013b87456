// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "logprobs/logits_edit.h"
#include "logprobs/logits_fold.h"

namespace prefkern {

template <class S> void bind_logit_structs(py::module_& m, const std::string& suffix) {
  using Transform = LogitTransform<S>;
  Struct<Transform> t(m, "LogitTransform" + suffix);
  t.member("scale", &Transform::scale).member("softcap", &Transform::softcap).member("temperature", &Transform::temperature);
  t.member("bias", &Transform::bias);
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
}

inline void bind_logprobs_cuda(py::module_& m) {
  bind_cuda(m, "cuda_fold_logits", &cuda_fold_logits);
  bind_cuda(m, "cuda_grad_logits", &cuda_grad_logits);
  bind_cuda(m, "cuda_grad_bias", &cuda_grad_bias);
  bind_cuda(m, "cuda_round_logits", &cuda_round_logits);
}

}  // namespace prefkern
