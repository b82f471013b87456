#include "logprobs/head.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace prefkern {

void check_head_options(const HeadOptions& o) {
  check_value(o.temperature > 0 && std::isfinite(o.temperature), "temperature is ", o.temperature,
              "; it must be positive and finite");
  check_value(o.softcap >= 0 && std::isfinite(o.softcap), "softcap is ", o.softcap,
              "; it must be positive and finite, or None");
  check_value(o.logit_scale > 0 && std::isfinite(o.logit_scale), "logit_scale is ", o.logit_scale,
              "; it must be positive and finite");
}

std::pair<Tensor, int64_t> checked_targets(const Tensor& targets, const Tensor& scores, const char* scores_name, int64_t rows,
                                           int64_t vocab, int64_t ignore_index) {
  check_type(targets.scalar_type() == ScalarType::Long || targets.scalar_type() == ScalarType::Int, "targets has dtype ",
             dtype_name(targets.scalar_type()), "; accepted: int64, int32");
  check_same_device(targets, "targets", scores, scores_name);
  check_value(targets.dim() == 1 && targets.size(0) == rows, "targets has shape ", shape_text(targets), "; ", scores_name,
              " has ", rows, " rows, so [", rows, "] is expected");
  Tensor t = to_contiguous(cast(targets, ScalarType::Long));
  int64_t ignored = 0;
  if (t.is_cpu()) {
    const int64_t* p = data<int64_t>(t);
    for (int64_t i = 0; i < rows; i++) {
      if (p[i] == ignore_index) ignored++;
      else
        check_value(p[i] >= 0 && p[i] < vocab, "targets[", i, "] is ", p[i], "; accepted: 0 to ", vocab - 1,
                    ", or ignore_index = ", ignore_index);
    }
  }
  return {t, ignored};
}

Tensor active_rows(const Tensor& targets, int64_t ignored, int64_t ignore_index) {
  const int64_t rows = targets.size(0);
  Tensor active = empty({rows - ignored}, ScalarType::Long, targets);
  const int64_t* t = data<int64_t>(targets);
  int64_t* out = mutable_data<int64_t>(active);
  for (int64_t i = 0; i < rows; i++)
    if (t[i] != ignore_index) *out++ = i;
  return active;
}

OptTensor checked_row_temperature(const OptTensor& t, const Tensor& scores, const char* scores_name, int64_t rows, DType acc) {
  if (!t) return t;
  float_dtype(*t, "temperature");
  check_same_device(*t, "temperature", scores, scores_name);
  check_value(t->dim() == 1 && t->size(0) == rows, "temperature has shape ", shape_text(*t), "; ", scores_name, " has ", rows,
              " rows, so [", rows, "] or a number is expected");
  Tensor c = to_contiguous(cast(*t, scalar_type(acc)));
  if (c.is_cpu()) {
    for (int64_t i = 0; i < rows; i++) {
      const double v = acc == DType::f64 ? data<double>(c)[i] : data<float>(c)[i];
      check_value(v > 0 && std::isfinite(v), "temperature[", i, "] is ", v, "; it must be positive and finite");
    }
  }
  return c;
}

Tensor without_ignored_rows(const Tensor& hidden, const Tensor& targets, int64_t ignore_index) {
  namespace sd = torch::stable::detail;
  const Tensor ignored = torch::stable::full({}, double(ignore_index), ScalarType::Long, std::nullopt, targets.device());
  std::array<StableIValue, 2> ne{sd::from(targets), sd::from(ignored)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::ne", "Tensor", ne.data(), TORCH_ABI_VERSION));
  const Tensor counts = torch::stable::unsqueeze(sd::to<Tensor>(ne[0]), 1);
  std::array<StableIValue, 3> where{sd::from(counts), sd::from(hidden), sd::from(zeros({1}, hidden.scalar_type(), hidden))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::where", "self", where.data(), TORCH_ABI_VERSION));
  return sd::to<Tensor>(where[0]);
}

HeadOutputs make_outputs(int64_t outputs, int64_t rows, DType acc, const Tensor& like, bool zero) {
  const ScalarType st = scalar_type(acc);
  const auto make = [&](bool wanted, ScalarType type) {
    const int64_t n = wanted ? rows : 0;
    return zero ? zeros({n}, type, like) : empty({n}, type, like);
  };
  Tensor none = empty({0}, st, like);
  const auto some = [&](int64_t bit) { return outputs & bit ? make(true, st) : empty({0}, st, like); };
  Tensor stats = outputs & kSaveStats ? (zero ? zeros({2, rows}, st, like) : empty({2, rows}, st, like)) : none;
  return {make(true, st),
          some(kEntropy),
          some(kLse),
          some(kSumSqProbs),
          some(kMeanLogit),
          make((outputs & kIsTop1) != 0, ScalarType::Bool),
          stats};
}

HeadOutputs scatter_outputs(const HeadOutputs& compact, int64_t outputs, int64_t rows, const Tensor& active, DType acc) {
  HeadOutputs out = make_outputs(outputs, rows, acc, active, true);
  const auto put = [&](Tensor& into, const Tensor& from) {
    if (from.numel()) scatter_rows(into, active, from);
  };
  put(std::get<0>(out), std::get<0>(compact));
  put(std::get<1>(out), std::get<1>(compact));
  put(std::get<2>(out), std::get<2>(compact));
  put(std::get<3>(out), std::get<3>(compact));
  put(std::get<4>(out), std::get<4>(compact));
  put(std::get<5>(out), std::get<5>(compact));
  if (outputs & kSaveStats) {
    for (int64_t k = 0; k < 2; k++) {
      Tensor into = torch::stable::select(std::get<6>(out), 0, k);
      scatter_rows(into, active, torch::stable::select(std::get<6>(compact), 0, k));
    }
  }
  return out;
}

Upstream checked_upstream(const OptTensor& g_logp, const OptTensor& g_entropy, const OptTensor& g_lse, int64_t rows, DType acc,
                          const Tensor& entropy, const Tensor& stats) {
  const auto prepare = [&](const OptTensor& g, const char* name) -> OptTensor {
    if (!g) return g;
    check_value(g->dim() == 1 && g->size(0) == rows, name, " has shape ", shape_text(*g), "; expected [", rows, "]");
    return to_contiguous(cast(*g, scalar_type(acc)));
  };
  check_value(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == rows && stats.is_contiguous(), "stats has shape ",
              shape_text(stats), "; expected [2, ", rows, "]");
  check_value(!g_entropy || entropy.numel() == rows, "entropy has shape ", shape_text(entropy), "; expected [", rows, "]");
  return {prepare(g_logp, "g_logp"), prepare(g_entropy, "g_entropy"), prepare(g_lse, "g_lse")};
}

ActiveRows active_rows_of(const Tensor& targets, int64_t ignore_index, const Upstream& up) {
  const int64_t rows = targets.size(0);
  ActiveRows active{empty({rows}, ScalarType::Long, targets), std::nullopt, rows};
  const OptTensor& any = up.logp ? up.logp : up.entropy ? up.entropy : up.lse;
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    run_active_targets(
        ActiveTargetsArgs<S>{rows, data<int64_t>(targets), ignore_index, data_or_null<S>(up.logp), data_or_null<S>(up.entropy),
                             data_or_null<S>(up.lse), mutable_data<int64_t>(active.targets)},
        current_stream(targets), targets.is_cuda());
  };
  any && any->scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  if (!targets.is_cpu()) return active;
  const int64_t* t = data<int64_t>(active.targets);
  active.count = rows - std::count(t, t + rows, ignore_index);
  if (active.count < rows) active.index = active_rows(active.targets, rows - active.count, ignore_index);
  return active;
}

}  // namespace prefkern
