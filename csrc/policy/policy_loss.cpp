// policy_loss: a policy objective over padded [B, T] or packed [N] tokens, with its metrics and gradient.
#include <cmath>
#include <type_traits>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "policy/ops.h"
#include "policy/token_loss.h"

namespace prefkern {
namespace {

constexpr const char* kKindNames[] = {"clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none"};
constexpr double kInfinity = __builtin_inf();

DType loss_dtype(const Tensor& logp) {
  const DType type = float_dtype(logp, "logp");
  check_type(type == accumulator(type), "logp has dtype ", dtype_name(logp.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  return type;
}

// A tensor with one value per sequence or one per token; none at all.
struct Each {
  OptTensor values;
  bool per_token = false;
};

struct Inputs {
  Tensor logp;
  OptTensor old_logp, ref_logp, entropy, mask, anchor, norm;
  Each advantages, weights, lows, highs;
};

bool has_bounds(PolicyKind k) { return k == PolicyKind::clip || k == PolicyKind::gspo || k == PolicyKind::gspo_token; }

void check_options(const PolicyOptions& o, const char* kind, bool packed) {
  check_value(bounds_valid(o.kind, o.eps_low, 0), "eps_low is ", o.eps_low,
              o.kind == PolicyKind::gmpo ? "; it must be finite and not negative" : "; it must be between 0 and 1");
  check_value(bounds_valid(o.kind, 0, o.eps_high), "eps_high is ", o.eps_high, "; it must be finite and not negative");
  check_value(o.dual_clip > 1, "dual_clip is ", o.dual_clip, "; it must be greater than 1, or None");
  check_value(o.delta > 0, "delta is ", o.delta, "; it must be positive, or None");
  check_value(has_bounds(o.kind) || o.dual_clip == kInfinity, "dual_clip is ", o.dual_clip, " but kind is '", kind,
              "'; clip, gspo and gspo_token have that bound");
  check_value(has_bounds(o.kind) || o.delta == kInfinity, "delta is ", o.delta, " but kind is '", kind,
              "'; clip, gspo and gspo_token have that bound");
  check_value(o.tau_pos > 0 && std::isfinite(o.tau_pos), "tau_pos is ", o.tau_pos, "; it must be finite and positive");
  check_value(o.tau_neg > 0 && std::isfinite(o.tau_neg), "tau_neg is ", o.tau_neg, "; it must be finite and positive");
  check_value(o.clamp_low < 0 && o.clamp_high > 0, "ratio_clamp is (", o.clamp_low, ", ", o.clamp_high,
              "); it must be positive, a negative and a positive bound, or None");
  check_value(o.beta >= 0 && std::isfinite(o.beta), "beta is ", o.beta, "; it must be finite and not negative");
  check_value(o.kl_clamp > 0, "kl_clamp is ", o.kl_clamp, "; it must be positive, or None");
  check_value(o.anchor_gamma > 0 && std::isfinite(o.anchor_gamma), "anchor_gamma is ", o.anchor_gamma,
              "; it must be finite and positive");
  check_value(o.norm == -1 || (o.norm >= 0 && std::isfinite(o.norm)), "norm is ", o.norm,
              "; it must be finite and not negative, or None");
  const bool scaled = o.agg == Aggregation::seq_mean_token_sum_norm || o.agg == Aggregation::trl_dr_grpo;
  check_value(o.scale == 0 || (o.scale > 0 && std::isfinite(o.scale)), "scale is ", o.scale,
              "; it must be finite and positive, or None");
  check_value(o.scale == 0 || scaled, "scale is ", o.scale,
              "; only seq-mean-token-sum-norm and trl-dr_grpo are divided by it, so None is expected");
  check_value(o.scale != 0 || !scaled || (o.agg == Aggregation::seq_mean_token_sum_norm && !packed),
              "scale is None; trl-dr_grpo, and seq-mean-token-sum-norm of packed tokens, need it");
}

// `t` as one value per sequence or, where `tokens` allows it, one per token, of the type of logp.
Each checked_each(const OptTensor& t, const char* name, const Tensor& logp, const SequenceLayout& layout, bool tokens,
                  const char* kind) {
  if (!t) return {};
  float_dtype(*t, name);
  check_same_device(*t, name, logp, "logp");
  const bool per_row = t->dim() == 1 && t->size(0) == layout.sequences, per_token = tokens && same_shape(*t, logp);
  check_value(tokens || per_row, name, " has shape ", shape_text(*t), "; kind '", kind, "' has one per sequence, [",
              layout.sequences, "]; 'gspo_token' takes one per token");
  check_value(per_row || per_token, name, " has shape ", shape_text(*t), "; expected [", layout.sequences,
              "] (one per sequence) or ", shape_text(logp), " (one per token)");
  return {to_contiguous(cast(*t, logp.scalar_type())), per_token};
}

template <class S> void check_bounds(const Each& each, const char* name, PolicyKind kind, bool low, const OptTensor& mask) {
  if (!each.values || !each.values->is_cpu()) return;
  const S* v = data<S>(*each.values);
  const uint8_t* counts = each.per_token ? data_or_null<uint8_t>(mask) : nullptr;
  for (int64_t i = 0; i < each.values->numel(); i++)
    check_value((counts && !counts[i]) || bounds_valid(kind, low ? v[i] : 0, low ? 0 : v[i]), name, "[", i, "] is ", v[i],
                low && kind != PolicyKind::gmpo ? "; it must be between 0 and 1" : "; it must be finite and not negative");
}

template <class S> void run(const PolicyOptions& options, const SequenceLayout& layout, const Inputs& in,
                            const PolicyOutputs& out) {
  check_bounds<S>(in.lows, "eps_low", options.kind, true, in.mask);
  check_bounds<S>(in.highs, "eps_high", options.kind, false, in.mask);
  PolicyArgs<S> a;
  a.options = options;
  a.layout = layout;
  a.logp = data<S>(in.logp);
  a.old_logp = in.old_logp ? data<S>(*in.old_logp) : a.logp;
  a.ref_logp = data_or_null<S>(in.ref_logp);
  a.advantages = data_or_null<S>(in.advantages.values);
  a.token_advantages = in.advantages.per_token;
  a.weights = data_or_null<S>(in.weights.values);
  a.token_weights = in.weights.per_token;
  a.eps_low = data_or_null<S>(in.lows.values);
  a.token_eps_low = in.lows.per_token;
  a.eps_high = data_or_null<S>(in.highs.values);
  a.token_eps_high = in.highs.per_token;
  a.entropy = data_or_null<S>(in.entropy);
  a.anchor = data_or_null<uint8_t>(in.anchor);
  a.mask = data_or_null<uint8_t>(in.mask);
  a.norm = data_or_null<S>(in.norm);
  a.loss = mutable_data<S>(std::get<0>(out));
  a.metrics = mutable_data<S>(std::get<1>(out));
  if (std::get<2>(out).numel() > 0) a.grad = mutable_data<S>(std::get<2>(out));
  a.inverse_norm = mutable_data<S>(std::get<3>(out));
  if constexpr (std::is_same_v<S, float>) {
    if (in.logp.is_cuda()) {
      a.slices = policy_slices(layout);
      const int64_t blocks = layout.sequences * a.slices, sums = blocks * kPolicySums;
      const int64_t rows = ratio_of_sequence(options.kind) ? blocks * kPolicyRowSums : 0;
      const Tensor scratch = zeros({sums + rows + 1}, ScalarType::Float, in.logp);
      a.partials = mutable_data<float>(scratch);
      a.row_partials = a.partials + sums;
      a.finished = reinterpret_cast<uint32_t*>(a.row_partials + rows);
      return check_cuda(cuda_policy_loss(a, current_stream(in.logp)));
    }
  }
  cpu_policy_loss(a);
}

// The gradient into `grad`, which may be where it comes from.
void scale_gradient(const Tensor& g_loss, const Tensor& from, const Tensor& inverse_norm, const Tensor& grad) {
  const DType dtype = float_dtype(from, "unnormalised");
  const ScalarType st = from.scalar_type();
  check_type(dtype == accumulator(dtype) && g_loss.scalar_type() == st && inverse_norm.scalar_type() == st,
             "g_loss, unnormalised and inverse_norm have dtypes ", dtype_name(g_loss.scalar_type()), ", ", dtype_name(st),
             " and ", dtype_name(inverse_norm.scalar_type()), "; one of float32 and float64 is expected for all");
  check_value(g_loss.numel() == 1 && inverse_norm.numel() == 1, "g_loss and inverse_norm have shapes ", shape_text(g_loss),
              " and ", shape_text(inverse_norm), "; expected one element each");
  check_same_device(g_loss, "g_loss", from, "unnormalised");
  check_same_device(inverse_norm, "inverse_norm", from, "unnormalised");
  const OnDevice guard(from);
  const auto filled = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.unnormalised)>>;
    a.tokens = from.numel();
    a.unnormalised = data<S>(from);
    a.upstream = data<S>(g_loss);
    a.inverse_norm = data<S>(inverse_norm);
    a.grad = mutable_data<S>(grad);
    return a;
  };
  if (dtype == DType::f64) cpu_policy_loss_backward(filled(PolicyGradArgs<double>()));
  else if (from.is_cuda()) check_cuda(cuda_policy_loss_backward(filled(PolicyGradArgs<float>()), current_stream(from)));
  else cpu_policy_loss_backward(filled(PolicyGradArgs<float>()));
}

}  // namespace

PolicyOutputs policy_loss(const Tensor& logp, OptTensor old_logp, OptTensor advantages, OptTensor mask, OptTensor cu_seqlens,
                          OptTensor ref_logp, OptTensor token_weight, OptTensor lows, OptTensor highs, OptTensor anchor,
                          OptTensor entropy, OptTensor norm_tensor, int64_t kind, int64_t agg, int64_t kl, int64_t flags,
                          double eps_low, double eps_high, double dual_clip, double delta, double tau_pos, double tau_neg,
                          double clamp_low, double clamp_high, double beta, double kl_clamp, double anchor_gamma, double scale,
                          double norm, bool with_grad) {
  const DType dtype = loss_dtype(logp);
  check_value(kind >= 0 && kind < kPolicyKinds, "kind is ", kind, "; accepted: 0 to ", kPolicyKinds - 1);
  check_value(agg >= 0 && agg < kAggregations, "agg is ", agg, "; accepted: 0 to ", kAggregations - 1);
  check_value(kl >= 0 && kl < kKlKinds - 1, "kl is ", kl, "; accepted: 0 to ", kKlKinds - 2);
  check_value(flags >= 0 && flags <= (kKlRatio | kAnchorNll), "flags is ", flags, "; accepted: 0 to ", kKlRatio | kAnchorNll);
  const char* name = kKindNames[kind];
  PolicyOptions options{PolicyKind(kind),
                        ref_logp ? KlKind(kl + 1) : KlKind::none,
                        Aggregation(agg),
                        (flags & kKlRatio) != 0,
                        (flags & kAnchorNll) != 0,
                        eps_low,
                        eps_high,
                        dual_clip,
                        delta,
                        tau_pos,
                        tau_neg,
                        beta,
                        kl_clamp,
                        clamp_low,
                        clamp_high,
                        anchor_gamma,
                        scale,
                        norm};
  check_options(options, name, cu_seqlens.has_value());
  const bool none = options.kind == PolicyKind::none, needs_little = none || options.kind == PolicyKind::reinforce;
  check_value(ref_logp || beta == 0, "beta is ", beta, " but ref_logp is None; a penalty needs a reference");
  check_value(ref_logp || !(none || options.kl_ratio), "ref_logp is None; kind 'none' and kl_ratio need it");
  check_value(!none || !anchor, "anchor is given but kind is 'none', which has no policy term");
  check_value(!options.kl_ratio || options.kind != PolicyKind::gmpo,
              "kl_ratio is True but kind is 'gmpo', which has no ratio of a token");
  check_type(old_logp || (needs_little && !options.kl_ratio), "old_logp is None; kind '", name, "'",
             options.kl_ratio ? " with kl_ratio" : "", " needs a torch.Tensor");
  check_type(advantages || needs_little, "advantages is None; kind '", name, "' needs a torch.Tensor");
  const OnDevice guard(logp);
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const SequenceLayout layout = checked_layout(logp, "logp", cu_seqlens);
  if (options.scale == 0) options.scale = layout.padded_length > 0 ? double(layout.padded_length) : 1;

  const ScalarType st = logp.scalar_type();
  const auto tokens = [&](const OptTensor& t, const char* of) {
    return t ? OptTensor(checked_tokens(*t, of, logp, "logp", st)) : t;
  };
  const bool of_sequence = loss_of_sequence(options.kind);
  Inputs in;
  in.logp = to_contiguous(logp);
  in.old_logp = tokens(old_logp, "old_logp");
  in.ref_logp = tokens(ref_logp, "ref_logp");
  in.entropy = tokens(entropy, "entropy");
  in.mask = checked_mask(mask, logp, "logp");
  if (!none) in.advantages = checked_each(advantages, "advantages", logp, layout, !of_sequence, name);
  in.weights = checked_each(token_weight, "token_weight", logp, layout, true, name);
  in.lows = checked_each(lows, "eps_low", logp, layout, options.kind != PolicyKind::gspo, name);
  in.highs = checked_each(highs, "eps_high", logp, layout, options.kind != PolicyKind::gspo, name);
  if (anchor) {
    check_type(anchor->scalar_type() == ScalarType::Bool, "anchor has dtype ", dtype_name(anchor->scalar_type()),
               "; accepted: bool");
    check_same_device(*anchor, "anchor", logp, "logp");
    check_value(anchor->dim() == 1 && anchor->size(0) == layout.sequences, "anchor has shape ", shape_text(*anchor),
                "; expected [", layout.sequences, "]");
    in.anchor = to_contiguous(*anchor);
  }
  if (norm_tensor) {
    check_same_device(*norm_tensor, "norm", logp, "logp");
    check_value(norm_tensor->numel() == 1, "norm has shape ", shape_text(*norm_tensor), "; expected one element");
    in.norm = to_contiguous(cast(*norm_tensor, st));
    if (logp.is_cpu()) {
      const double n = dtype == DType::f64 ? *data<double>(*in.norm) : double(*data<float>(*in.norm));
      check_value(n >= 0 && std::isfinite(n), "norm is ", n, "; it must be finite and not negative");
    }
  }

  const bool nothing = logp.is_cuda() && layout.sequences == 0;  // no block would write the results
  const auto make = [&](std::initializer_list<int64_t> shape) {
    return nothing ? zeros(shape, st, logp) : empty(shape, st, logp);
  };
  const PolicyOutputs out{make({}), make({kPolicyMetrics}),
                          !with_grad        ? empty({0}, st, logp)
                          : logp.dim() == 2 ? make({logp.size(0), logp.size(1)})
                                            : make({logp.size(0)}),
                          make({})};
  if (nothing) return out;
  dtype == DType::f64 ? run<double>(options, layout, in, out) : run<float>(options, layout, in, out);
  return out;
}

Tensor policy_loss_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm) {
  const Tensor from = to_contiguous(unnormalised), grad = torch::stable::empty_like(from);
  scale_gradient(g_loss, from, inverse_norm, grad);
  return grad;
}

void policy_loss_backward_inplace(const Tensor& g_loss, Tensor unnormalised, const Tensor& inverse_norm) {
  check_value(unnormalised.is_contiguous(), "unnormalised is not contiguous; what is overwritten has to be");
  scale_gradient(g_loss, unnormalised, inverse_norm, unnormalised);
}

}  // namespace prefkern
