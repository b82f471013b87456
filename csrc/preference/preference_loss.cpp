// preference_loss: the loss of P pairs, or of P judged responses, with its metrics and gradient.
#include <cmath>
#include <type_traits>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "preference/ops.h"
#include "preference/pair_loss.h"

namespace prefkern {
namespace {

constexpr double kInfinity = __builtin_inf();

// One value, or one per pair; none at all.
struct Each {
  OptTensor values;
  bool per_pair = false;
};

struct Inputs {
  Tensor chosen;
  OptTensor rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, weight, desirable, tie, mask, norm;
  Each scale, offset, smoothing, chosen_target, rejected_target;
};

const char* smoothing_range(PreferenceKind kind) {
  if (kind == PreferenceKind::exo) return "it must be between 0 and 1, both excluded";
  return kind == PreferenceKind::robust ? "it must be at least 0 and below 1/2" : "it must be between 0 and 1";
}

void check_options(const PreferenceOptions& o, bool unpaired) {
  const auto positive = [](double v) { return v > 0 && std::isfinite(v); };
  check_value(positive(o.beta), "beta is ", o.beta, "; it must be finite and positive");
  check_value(positive(o.rejected_beta), "rejected_beta is ", o.rejected_beta, "; it must be finite and positive");
  check_value(std::isfinite(o.scale), "scale is ", o.scale, "; it must be finite");
  check_value(std::isfinite(o.offset), "offset is ", o.offset, "; it must be finite");
  check_value(std::isfinite(o.chosen_target), "chosen_target is ", o.chosen_target, "; it must be finite");
  check_value(std::isfinite(o.rejected_target), "rejected_target is ", o.rejected_target, "; it must be finite");
  check_value(o.score != ScoreKind::alpha || (o.alpha != 0 && std::isfinite(o.alpha)), "alpha is ", o.alpha,
              "; it must be finite and not 0");
  check_value(positive(o.exp_cap), "exp_cap is ", o.exp_cap, "; it must be finite and positive");
  check_value(o.max_p == kInfinity || (o.max_p > 0 && o.max_p < 1), "max_p is ", o.max_p,
              "; it must be between 0 and 1, or None");
  check_value(o.max_p == kInfinity || o.score == ScoreKind::log_odds, "max_p is ", o.max_p,
              " but score is not 'log_odds', the only one that has that bound");
  check_value(o.clip > 0, "clip is ", o.clip, "; it must be positive, or None");
  check_value(std::isfinite(o.factor), "factor is ", o.factor, "; it must be finite");
  if (unpaired) {
    check_value(o.chosen_weight >= 0 && std::isfinite(o.chosen_weight), "desirable_weight is ", o.chosen_weight,
                "; it must be finite and not negative");
    check_value(o.rejected_weight >= 0 && std::isfinite(o.rejected_weight), "undesirable_weight is ", o.rejected_weight,
                "; it must be finite and not negative");
    return;
  }
  check_value(smoothing_valid(o.kind, o.smoothing), "label_smoothing is ", o.smoothing, "; ", smoothing_range(o.kind));
  const double c = o.parameter;
  switch (o.kind) {
    case PreferenceKind::discopop: return check_value(positive(c), "tau is ", c, "; it must be finite and positive");
    case PreferenceKind::dpop:
      return check_value(c >= 0 && std::isfinite(c), "penalty is ", c, "; it must be finite and not negative");
    case PreferenceKind::focal:
      return check_value(c >= 0 && std::isfinite(c), "gamma is ", c, "; it must be finite and not negative");
    case PreferenceKind::rao_kupper:
      return check_value(c > 1 && std::isfinite(c), "nu is ", c,
                         "; for kind 'rao_kupper' it must be finite and greater than 1");
    case PreferenceKind::davidson: return check_value(positive(c), "nu is ", c, "; it must be finite and positive");
    case PreferenceKind::asft: return check_value(std::isfinite(c), "sft is ", c, "; it must be finite");
    default: return;
  }
}

void check_pairs(const Tensor& t, const char* name, const Tensor& chosen, const char* chosen_name) {
  check_same_device(t, name, chosen, chosen_name);
  check_value(t.dim() == 1 && t.size(0) == chosen.size(0), name, " has shape ", shape_text(t), "; ", chosen_name, " has shape ",
              shape_text(chosen), ", so the same is expected");
}

// A number per pair.
OptTensor per_pair(const OptTensor& t, const char* name, const Tensor& chosen, const char* chosen_name) {
  if (!t) return t;
  check_pairs(*t, name, chosen, chosen_name);
  return to_contiguous(cast(*t, chosen.scalar_type()));
}
OptTensor flags(const OptTensor& t, const char* name, const Tensor& chosen, const char* chosen_name) {
  if (!t) return t;
  check_type(t->scalar_type() == ScalarType::Bool, name, " has dtype ", dtype_name(t->scalar_type()), "; accepted: bool");
  check_pairs(*t, name, chosen, chosen_name);
  return to_contiguous(*t);
}
Each one_or_each(const OptTensor& t, const char* name, const Tensor& chosen, const char* chosen_name) {
  if (!t) return {};
  float_dtype(*t, name);
  check_same_device(*t, name, chosen, chosen_name);
  const bool each = t->dim() == 1 && t->size(0) == chosen.size(0);
  check_value(each || t->numel() == 1, name, " has shape ", shape_text(*t), "; expected [", chosen.size(0),
              "] (one per pair) or one element");
  return {to_contiguous(cast(*t, chosen.scalar_type())), each};
}

// What only the data can tell, on the CPU: lengths, smoothing, weights. What does not count is not looked at.
template <class S> void check_data(const PreferenceOptions& o, const Inputs& in, bool unpaired) {
  if (!in.chosen.is_cpu()) return;
  const uint8_t* mask = data_or_null<uint8_t>(in.mask);
  const int64_t count = in.chosen.size(0);
  const auto each = [&](const OptTensor& t, bool per_pair, auto good, const char* name, const char* expected) {
    if (!t) return;
    const S* v = data<S>(*t);
    for (int64_t i = 0; i < (per_pair ? count : 1); i++)
      check_value((per_pair && mask && !mask[i]) || good(v[i]), name, "[", i, "] is ", v[i], "; ", expected);
  };
  const auto finite = [](S v) { return std::isfinite(v); };
  const auto length = [](S v) { return v > 0 && std::isfinite(v); };
  const char* tokens = "a response needs at least one token";
  each(in.chosen_lengths, true, length, unpaired ? "lengths" : "chosen_lengths", tokens);
  each(in.rejected_lengths, true, length, "rejected_lengths", tokens);
  each(in.weight, true, [](S v) { return v >= 0 && std::isfinite(v); }, "weight", "it must be finite and not negative");
  each(in.scale.values, in.scale.per_pair, finite, "scale", "it must be finite");
  each(in.offset.values, in.offset.per_pair, finite, "offset", "it must be finite");
  each(in.chosen_target.values, in.chosen_target.per_pair, finite, "chosen_target", "it must be finite");
  each(in.rejected_target.values, in.rejected_target.per_pair, finite, "rejected_target", "it must be finite");
  each(
      in.smoothing.values, in.smoothing.per_pair, [&](S v) { return smoothing_valid<double>(o.kind, v); }, "label_smoothing",
      smoothing_range(o.kind));
  if (in.norm)
    each(in.norm, false, [](S v) { return v >= 0 && std::isfinite(v); }, "norm", "it must be finite and not negative");
}

template <class S>
void run(const PreferenceOptions& options, PairReduction reduction, double norm, const Inputs& in,
         const PreferenceOutputs& out) {
  const bool unpaired = in.desirable.has_value();
  check_data<S>(options, in, unpaired);
  PreferenceArgs<S> a;
  a.options = options;
  a.reduction = reduction;
  a.pairs = in.chosen.size(0);
  a.chosen = data<S>(in.chosen);
  a.rejected = data_or_null<S>(in.rejected);
  a.ref_chosen = data_or_null<S>(in.ref_chosen);
  a.ref_rejected = data_or_null<S>(in.ref_rejected);
  a.chosen_length = data_or_null<S>(in.chosen_lengths);
  a.rejected_length = data_or_null<S>(in.rejected_lengths);
  const auto set = [&](const Each& from, const S*& to, PairEach flag) {
    to = data_or_null<S>(from.values);
    if (from.per_pair) a.each |= flag;
  };
  set(in.scale, a.scale, kEachScale);
  set(in.offset, a.offset, kEachOffset);
  set(in.smoothing, a.smoothing, kEachSmoothing);
  set(in.chosen_target, a.chosen_target, kEachChosenTarget);
  set(in.rejected_target, a.rejected_target, kEachRejectedTarget);
  a.weight = data_or_null<S>(in.weight);
  a.tie = data_or_null<uint8_t>(in.tie);
  a.desirable = data_or_null<uint8_t>(in.desirable);
  a.mask = data_or_null<uint8_t>(in.mask);
  a.norm = data_or_null<S>(in.norm);
  a.given_norm = norm;
  const auto& [loss, metrics, grads, inverse_norm] = out;
  if (reduction == PairReduction::none) a.losses = mutable_data<S>(loss);
  else a.loss = mutable_data<S>(loss);
  a.metrics = mutable_data<S>(metrics);
  a.inverse_norm = mutable_data<S>(inverse_norm);
  if (grads.numel() > 0) a.grads = mutable_data<S>(grads);
  if constexpr (std::is_same_v<S, float>) {
    if (in.chosen.is_cuda()) {
      const int64_t sums = preference_blocks(a.pairs) * kPreferenceSums;
      const Tensor scratch = zeros({sums + 1}, ScalarType::Float, in.chosen);
      a.partials = mutable_data<float>(scratch);
      a.finished = reinterpret_cast<uint32_t*>(a.partials + sums);
      return check_cuda(cuda_preference_loss(a, current_stream(in.chosen)));
    }
  }
  cpu_preference_loss(a);
}

}  // namespace

PreferenceOutputs preference_loss(const Tensor& chosen, OptTensor rejected, OptTensor ref_chosen, OptTensor ref_rejected,
                                  OptTensor desirable, OptTensor chosen_lengths, OptTensor rejected_lengths, OptTensor scale,
                                  OptTensor offset, OptTensor smoothing, OptTensor chosen_target, OptTensor rejected_target,
                                  OptTensor weight, OptTensor tie, OptTensor mask, OptTensor norm_tensor, int64_t kind,
                                  int64_t score, int64_t average, int64_t reduction, double beta, double rejected_beta,
                                  double chosen_reward, double rejected_reward, double scale_number, double offset_number,
                                  double smoothing_number, double chosen_target_number, double rejected_target_number,
                                  double alpha, double exp_cap, double max_p, double parameter, double clip, double factor,
                                  double chosen_weight, double rejected_weight, double norm, bool with_grad) {
  const bool unpaired = desirable.has_value();
  const char* name = unpaired ? "logp" : "chosen_logp";
  const DType dtype = float_dtype(chosen, name);
  const ScalarType st = chosen.scalar_type();
  check_type(dtype == accumulator(dtype), name, " has dtype ", dtype_name(st), "; accepted: float32, and float64 on the CPU");
  check_value(chosen.dim() == 1, name, " has shape ", shape_text(chosen), "; expected [P]", unpaired ? "" : ", one per pair");
  const int64_t kinds = unpaired ? kUnpairedKinds : kPreferenceKinds;
  check_value(kind >= 0 && kind < kinds, "kind is ", kind, "; accepted: 0 to ", kinds - 1);
  check_value(score >= 0 && score < kScoreKinds, "score is ", score, "; accepted: 0 to ", kScoreKinds - 1);
  check_value(average >= 0 && average < kLengthAverages, "average is ", average, "; accepted: 0 to ", kLengthAverages - 1);
  check_value(reduction >= 0 && reduction < 4, "reduction is ", reduction, "; accepted: 0 to 3");
  check_value(unpaired != rejected.has_value(),
              unpaired ? "rejected_logp is given with labels of single responses" : "rejected_logp is None; pairs need it");
  check_value(norm == -1 || (norm >= 0 && std::isfinite(norm)), "norm is ", norm,
              "; it must be finite and not negative, or None");
  PreferenceOptions o;
  if (unpaired) o.unpaired = UnpairedKind(kind);
  else o.kind = PreferenceKind(kind);
  o.score = ScoreKind(score), o.average = LengthAverage(average);
  o.beta = beta, o.rejected_beta = rejected_beta, o.chosen_reward = chosen_reward, o.rejected_reward = rejected_reward;
  o.scale = scale_number, o.offset = offset_number, o.smoothing = smoothing_number;
  o.chosen_target = chosen_target_number, o.rejected_target = rejected_target_number;
  o.alpha = alpha, o.exp_cap = exp_cap, o.max_p = max_p, o.parameter = parameter, o.clip = clip, o.factor = factor;
  o.chosen_weight = chosen_weight, o.rejected_weight = rejected_weight;
  check_options(o, unpaired);
  const bool averaged = o.average != LengthAverage::none;
  const char* lengths = unpaired ? "lengths" : "chosen_lengths";
  check_value(averaged == chosen_lengths.has_value(), lengths,
              averaged ? " is None; average needs it" : " is given but average is None");
  check_value((averaged && !unpaired) == rejected_lengths.has_value(), "rejected_lengths",
              averaged ? " is None; average needs it" : " is given but average is None");
  const bool ties = !unpaired && (o.kind == PreferenceKind::rao_kupper || o.kind == PreferenceKind::davidson);
  check_value(ties || !tie, "tie is given; only kinds 'rao_kupper' and 'davidson' know ties");
  const OnDevice guard(chosen);

  Inputs in;
  in.chosen = to_contiguous(chosen);
  in.rejected = per_pair(rejected, "rejected_logp", chosen, name);
  in.ref_chosen = per_pair(ref_chosen, unpaired ? "ref_logp" : "ref_chosen_logp", chosen, name);
  in.ref_rejected = per_pair(ref_rejected, "ref_rejected_logp", chosen, name);
  in.chosen_lengths = per_pair(chosen_lengths, lengths, chosen, name);
  in.rejected_lengths = per_pair(rejected_lengths, "rejected_lengths", chosen, name);
  in.weight = per_pair(weight, "weight", chosen, name);
  in.desirable = flags(desirable, "desirable", chosen, name);
  in.tie = flags(tie, "tie", chosen, name);
  in.mask = flags(mask, "mask", chosen, name);
  in.scale = one_or_each(scale, "scale", chosen, name);
  in.offset = one_or_each(offset, "offset", chosen, name);
  in.smoothing = one_or_each(smoothing, "label_smoothing", chosen, name);
  in.chosen_target = one_or_each(chosen_target, unpaired ? "target" : "chosen_target", chosen, name);
  in.rejected_target = one_or_each(rejected_target, "rejected_target", chosen, name);
  if (norm_tensor) {
    check_same_device(*norm_tensor, "norm", chosen, name);
    check_value(norm_tensor->numel() == 1, "norm has shape ", shape_text(*norm_tensor), "; expected one element");
    in.norm = to_contiguous(cast(*norm_tensor, st));
  }

  const int64_t pairs = chosen.size(0);
  const bool nothing = pairs == 0;  // no block would write the results
  const auto make = [&](std::initializer_list<int64_t> shape) {
    return nothing ? zeros(shape, st, chosen) : empty(shape, st, chosen);
  };
  const PreferenceOutputs out{PairReduction(reduction) == PairReduction::none ? make({pairs}) : make({}),
                              make({kPreferenceMetrics}), make({with_grad ? (unpaired ? 1 : 2) : 0, pairs}), make({})};
  if (nothing) return out;
  dtype == DType::f64 ? run<double>(o, PairReduction(reduction), norm, in, out)
                      : run<float>(o, PairReduction(reduction), norm, in, out);
  return out;
}

namespace {

// Into `grad`, which may be the unnormalised gradient itself.
void scale_gradient(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm, const Tensor& grad) {
  const ScalarType st = unnormalised.scalar_type();
  check_type(g_loss.scalar_type() == st && inverse_norm.scalar_type() == st,
             "g_loss, unnormalised and inverse_norm have dtypes ", dtype_name(g_loss.scalar_type()), ", ", dtype_name(st),
             " and ", dtype_name(inverse_norm.scalar_type()), "; one of float32 and float64 is expected for all");
  const int64_t pairs = unnormalised.size(1);
  const bool vector = g_loss.dim() == 1 && g_loss.size(0) == pairs;
  check_value((vector || g_loss.numel() == 1) && inverse_norm.numel() == 1, "g_loss and inverse_norm have shapes ",
              shape_text(g_loss), " and ", shape_text(inverse_norm),
              "; expected one element, or one per pair, and one element");
  check_same_device(g_loss, "g_loss", unnormalised, "unnormalised");
  check_same_device(inverse_norm, "inverse_norm", unnormalised, "unnormalised");
  const OnDevice guard(unnormalised);
  const Tensor upstream = to_contiguous(g_loss);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.grad)>;
    a.pairs = pairs;
    a.sides = unnormalised.size(0);
    a.vector = vector;
    a.unnormalised = data<S>(unnormalised);
    a.upstream = data<S>(upstream);
    a.inverse_norm = data<S>(inverse_norm);
    a.grad = mutable_data<S>(grad);
    return a;
  };
  if (st == ScalarType::Double) cpu_preference_loss_backward(filled(PreferenceGradArgs<double>()));
  else if (unnormalised.is_cuda())
    check_cuda(cuda_preference_loss_backward(filled(PreferenceGradArgs<float>()), current_stream(unnormalised)));
  else cpu_preference_loss_backward(filled(PreferenceGradArgs<float>()));
}

void check_unnormalised(const Tensor& unnormalised) {
  const DType dtype = float_dtype(unnormalised, "unnormalised");
  check_type(dtype == accumulator(dtype), "unnormalised has dtype ", dtype_name(unnormalised.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  check_value(unnormalised.dim() == 2, "unnormalised has shape ", shape_text(unnormalised), "; expected [sides, P]");
}

}  // namespace

Tensor preference_loss_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm) {
  check_unnormalised(unnormalised);
  const Tensor from = to_contiguous(unnormalised), grad = torch::stable::empty_like(from);
  scale_gradient(g_loss, from, inverse_norm, grad);
  return grad;
}

void preference_loss_backward_inplace(const Tensor& g_loss, Tensor unnormalised, const Tensor& inverse_norm) {
  check_unnormalised(unnormalised);
  check_value(unnormalised.is_contiguous(), "unnormalised is not contiguous; what is overwritten has to be");
  scale_gradient(g_loss, unnormalised, inverse_norm, unnormalised);
}

}  // namespace prefkern
