// conflict_runs and conflict_weights: where completions of both signs agree, and what their tokens weigh there.
#include <cmath>

#include "conflicts/ops.h"
#include "conflicts/runs.h"
#include "core/arguments.h"
#include "core/cuda_runtime.h"

namespace prefkern {
namespace {

using Runs = std::tuple<Tensor, Tensor, Tensor>;

void check_advantages(const Tensor& advantages, const SequenceLayout& layout, const Tensor& tokens) {
  check_same_device(advantages, "advantages", tokens, "tokens");
  check_value(advantages.dim() == 1 && advantages.size(0) == layout.sequences, "advantages has shape ", shape_text(advantages),
              "; expected [", layout.sequences, "] (one per sequence)");
}

template <class S> void check_signs(const Tensor& advantages) {
  const S* a = data<S>(advantages);
  for (int64_t i = 0; i < advantages.numel(); i++) check_value(a[i] == a[i], "advantages[", i, "] is nan; its sign is needed");
}

template <class T>
void run(const SequenceLayout& layout, const Tensor& tokens, const Tensor& advantages, const Tensor& group,
         const OptTensor& mask, const Runs& out) {
  ConflictArgs<T> a;
  a.layout = layout;
  a.tokens = data<T>(tokens);
  (advantages.scalar_type() == ScalarType::Double) ? void(a.advantages64 = data<double>(advantages))
                                                   : void(a.advantages = data<float>(advantages));
  a.group = data<int64_t>(group);
  a.mask = data_or_null<uint8_t>(mask);
  a.forward = mutable_data<int64_t>(std::get<0>(out));
  a.backward = mutable_data<int64_t>(std::get<1>(out));
  a.length = mutable_data<int64_t>(std::get<2>(out));
  if (tokens.is_cuda()) {
    const auto sorted = sort_ids(group);
    a.group = data<int64_t>(sorted.first);
    a.order = data<int64_t>(sorted.second);
    return check_cuda(cuda_conflict_runs(a, current_stream(tokens)));
  }
  const int64_t bad = cpu_conflict_runs(a);
  check_value(bad < 0, "mask of row ", bad, " has a token that counts behind one that does not; accepted: a run of True from ",
              "the first token on");
}

const Tensor& checked_runs(const Tensor& t, const char* name, const SequenceLayout& layout, const Tensor& tokens) {
  check_type(t.scalar_type() == ScalarType::Long, "runs.", name, " has dtype ", dtype_name(t.scalar_type()),
             "; accepted: int64");
  check_same_device(t, name, tokens, "tokens");
  check_value(t.dim() == 1 && t.size(0) == layout.sequences, "runs.", name, " has shape ", shape_text(t), "; expected [",
              layout.sequences, "] (one per sequence)");
  return t;
}

}  // namespace

Runs conflict_runs(const Tensor& tokens, const Tensor& advantages, const Tensor& group, OptTensor mask, OptTensor cu_seqlens) {
  const bool wide = tokens.scalar_type() == ScalarType::Long;
  check_type(wide || tokens.scalar_type() == ScalarType::Int, "tokens has dtype ", dtype_name(tokens.scalar_type()),
             "; accepted: int64, int32");
  const DType acc = accumulator(float_dtype(advantages, "advantages"));
  const OnDevice guard(tokens);
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const SequenceLayout layout = checked_layout(tokens, "tokens", cu_seqlens);
  mask = checked_mask(mask, tokens, "tokens");
  check_advantages(advantages, layout, tokens);
  const Tensor ids = checked_group(group, advantages, "advantages");
  const Tensor t = to_contiguous(tokens), a = to_contiguous(cast(advantages, scalar_type(acc)));
  if (a.is_cpu()) acc == DType::f64 ? check_signs<double>(a) : check_signs<float>(a);

  const int64_t rows = layout.sequences;
  const Runs out{empty({rows}, ScalarType::Long, t), empty({rows}, ScalarType::Long, t), empty({rows}, ScalarType::Long, t)};
  if (rows == 0) return out;
  wide ? run<int64_t>(layout, t, a, ids, mask, out) : run<int32_t>(layout, t, a, ids, mask, out);
  return out;
}

Tensor conflict_weights(const Tensor& tokens, const Tensor& advantages, const Tensor& forward, const Tensor& backward,
                        const Tensor& length, OptTensor cu_seqlens, double w_pos, double w_neg, int64_t combine) {
  const DType acc = accumulator(float_dtype(advantages, "advantages"));
  check_value(std::isfinite(w_pos), "w_pos is ", w_pos, "; it must be finite");
  check_value(std::isfinite(w_neg), "w_neg is ", w_neg, "; it must be finite");
  check_value(combine >= 0 && combine <= 1, "combine is ", combine, "; accepted: 0, 1");
  const OnDevice guard(tokens);
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const SequenceLayout layout = checked_layout(tokens, "tokens", cu_seqlens);
  check_advantages(advantages, layout, tokens);
  const Tensor a = to_contiguous(cast(advantages, scalar_type(acc)));
  const Tensor f = to_contiguous(checked_runs(forward, "forward", layout, tokens));
  const Tensor b = to_contiguous(checked_runs(backward, "backward", layout, tokens));
  const Tensor n = to_contiguous(checked_runs(length, "length", layout, tokens));
  const Tensor out = tokens.dim() == 2 ? empty({tokens.size(0), tokens.size(1)}, a.scalar_type(), tokens)
                                       : empty({tokens.size(0)}, a.scalar_type(), tokens);
  const auto fill = [&](auto& args) {
    using S = std::remove_pointer_t<decltype(args.weights)>;
    args.rule = {static_cast<ConflictCombine>(combine), w_pos, w_neg};
    args.layout = layout;
    args.advantages = data<S>(a);
    args.forward = data<int64_t>(f);
    args.backward = data<int64_t>(b);
    args.length = data<int64_t>(n);
    args.weights = mutable_data<S>(out);
  };
  if (acc == DType::f64) {
    ConflictWeightArgs<double> args;
    fill(args);
    cpu_conflict_weights(args);
  } else {
    ConflictWeightArgs<float> args;
    fill(args);
    out.is_cuda() ? check_cuda(cuda_conflict_weights(args, current_stream(out))) : cpu_conflict_weights(args);
  }
  return out;
}

}  // namespace prefkern
