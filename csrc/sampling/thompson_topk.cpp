// beta_thompson_topk and decayed_beta_update_: which prompts to roll out, and what is known of them afterwards.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "sampling/beta_thompson.h"
#include "sampling/ops.h"

namespace prefkern {
namespace {

// Counts of M prompts: float32, or float64 on the CPU.
void check_counts(const Tensor& alpha, const Tensor& beta) {
  for (const auto& [t, name] : {std::pair<const Tensor&, const char*>{alpha, "alpha"}, {beta, "beta"}}) {
    const bool wide = t.scalar_type() == ScalarType::Double && t.is_cpu();
    check_type(t.scalar_type() == ScalarType::Float || wide, name, " has dtype ", dtype_name(t.scalar_type()), " on ",
               device_text(t), "; accepted: float32, and float64 on the CPU");
  }
  check_value(alpha.dim() == 1, "alpha has shape ", shape_text(alpha), "; expected [M]");
  check_value(same_shape(alpha, beta), "beta has shape ", shape_text(beta), "; alpha has shape ", shape_text(alpha),
              ", so the same is expected");
  check_same_device(beta, "beta", alpha, "alpha");
  check_type(beta.scalar_type() == alpha.scalar_type(), "beta has dtype ", dtype_name(beta.scalar_type()), "; alpha has ",
             dtype_name(alpha.scalar_type()), ", so the same is expected");
}

template <class S> void check_count(const char* name, S x, int64_t i) {
  check_value(x >= 0 && x <= S(kMostEvidence), name, "[", i, "] is ", x, "; a count is finite, not negative and at most 1e30");
}

// Stably, the largest first.
Tensor sorted_down(const Tensor& values, Tensor& ids) {
  namespace sd = torch::stable::detail;
  std::array<StableIValue, 4> stack{sd::from(values), sd::from(std::optional<bool>(true)), sd::from(int64_t(0)),
                                    sd::from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  ids = sd::to<Tensor>(stack[1]);
  return sd::to<Tensor>(stack[0]);
}

Tensor first_of(Tensor t, int64_t k) { return torch::stable::clone(torch::stable::narrow(t, 0, 0, k)); }

template <class S>
std::tuple<Tensor, Tensor, Tensor> topk(ThompsonArgs<S> a, const Tensor& alpha, const Tensor& beta, const OptTensor& eligible,
                                        bool with_draws) {
  const ScalarType type = alpha.scalar_type();
  a.count = alpha.size(0);
  a.alpha = data<S>(alpha);
  a.beta = data<S>(beta);
  a.eligible = data_or_null<uint8_t>(eligible);
  const Tensor draws = empty({with_draws ? a.count : 0}, type, alpha);
  a.draws = with_draws ? mutable_data<S>(draws) : nullptr;
  if constexpr (std::is_same_v<S, float>) {
    if (alpha.is_cuda()) {
      const Tensor utilities = empty({a.count}, type, alpha);
      a.utilities = mutable_data<float>(utilities);
      check_cuda(cuda_beta_thompson(a, current_stream(alpha)));
      Tensor ids;
      const Tensor sorted = sorted_down(utilities, ids);
      return {first_of(ids, a.k), first_of(sorted, a.k), draws};
    }
  }
  const Tensor ids = empty({a.k}, ScalarType::Long, alpha), top = empty({a.k}, type, alpha);
  std::array<int64_t, 2> found{};
  a.ids = mutable_data<int64_t>(ids);
  a.top = mutable_data<S>(top);
  a.found = found.data();
  cpu_beta_thompson(a);
  if (const int64_t i = found[1]; i >= 0) {
    check_count("alpha", a.alpha[i], i);
    check_count("beta", a.beta[i], i);
  }
  check_value(found[0] >= a.k, "k is ", a.k, "; ", found[0], " prompts are eligible");
  return {ids, top, draws};
}

template <class S>
void update(const Tensor& alpha, const Tensor& beta, const Tensor& ids, const Tensor& successes, const Tensor& rollouts,
            double lam1, double lam2) {
  BetaUpdateArgs<S> a;
  a.count = alpha.size(0);
  a.selected = ids.size(0);
  a.alpha = mutable_data<S>(alpha);
  a.beta = mutable_data<S>(beta);
  a.successes = data<S>(successes);
  a.rollouts = data<S>(rollouts);
  a.lam1 = lam1;
  a.lam2 = lam2;
  const Tensor scratch = empty({2 * a.selected}, alpha.scalar_type(), alpha);
  a.scratch = mutable_data<S>(scratch);
  if constexpr (std::is_same_v<S, float>) {
    if (alpha.is_cuda()) {
      const auto sorted = sort_ids(ids);
      a.ids = data<int64_t>(sorted.first);
      a.order = data<int64_t>(sorted.second);
      return check_cuda(cuda_beta_update(a, current_stream(alpha)));
    }
  }
  // Everything is looked at before anything is changed.
  a.ids = data<int64_t>(ids);
  for (int64_t i = 0; i < a.count; i++) {
    if (!(a.alpha[i] >= 0 && a.alpha[i] <= S(kMostEvidence))) check_count("alpha", a.alpha[i], i);
    if (!(a.beta[i] >= 0 && a.beta[i] <= S(kMostEvidence))) check_count("beta", a.beta[i], i);
  }
  for (int64_t i = 0; i < a.selected; i++) {
    check_value(a.ids[i] >= 0 && a.ids[i] < a.count, "ids[", i, "] is ", a.ids[i], "; accepted: 0 to ", a.count - 1);
    const S s = a.successes[i], n = a.rollouts[i];
    check_value(std::isfinite(n) && n >= 0, "n[", i, "] is ", n, "; a number of rollouts is finite and not negative");
    check_value(s >= 0 && s <= n, "successes[", i, "] is ", s, "; it must lie between 0 and n[", i, "], ", n);
  }
  std::vector<int64_t> sorted(a.ids, a.ids + a.selected);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) fail("ValueError", "ids holds ", *twice, " twice; a prompt is selected once in a step");
  cpu_beta_update(a);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> beta_thompson_topk(const Tensor& alpha, const Tensor& beta, OptTensor eligible, int64_t k,
                                                      int64_t utility, int64_t mode, int64_t seed, int64_t step,
                                                      bool with_draws) {
  check_counts(alpha, beta);
  check_value(utility >= 0 && utility <= 1, "utility is ", utility, "; accepted: 0, 1");
  check_value(mode >= 0 && mode <= 1, "mode is ", mode, "; accepted: 0, 1");
  check_value(alpha.size(0) < int64_t(1) << 32, "alpha has ", alpha.size(0), " prompts; fewer than 2^32 are accepted");
  check_value(k >= 1 && k <= alpha.size(0), "k is ", k, "; accepted: 1 to the number of prompts, ", alpha.size(0));
  check_value(step >= 0 && step < int64_t(1) << 32, "step is ", step, "; accepted: 0 to 2^32 - 1");
  const OnDevice guard(alpha);
  const OptTensor mask = checked_mask(eligible, alpha, "alpha", "eligible");
  const Tensor a = to_contiguous(alpha), b = to_contiguous(beta);
  const auto run = [&](auto scalar) {
    ThompsonArgs<decltype(scalar)> args;
    args.k = k;
    args.utility = static_cast<ThompsonUtility>(utility);
    args.mode = static_cast<ThompsonMode>(mode);
    args.seed = static_cast<uint64_t>(seed);
    args.step = static_cast<uint32_t>(step);
    return topk(args, a, b, mask, with_draws);
  };
  return alpha.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

void decayed_beta_update(const Tensor& alpha, const Tensor& beta, const Tensor& ids, const Tensor& successes,
                         const Tensor& rollouts, double lam1, double lam2) {
  check_counts(alpha, beta);
  check_value(alpha.is_contiguous(), "alpha is not contiguous; it is changed in place, so it must be");
  check_value(beta.is_contiguous(), "beta is not contiguous; it is changed in place, so it must be");
  check_value(alpha.numel() == 0 || alpha.const_data_ptr() != beta.const_data_ptr(), "alpha and beta are the same memory");
  check_value(lam1 >= 0 && lam1 <= 1, "lam1 is ", lam1, "; it must lie in [0, 1]");
  check_value(lam2 >= 0 && lam2 <= 1, "lam2 is ", lam2, "; it must lie in [0, 1]");
  const OnDevice guard(alpha);
  check_value(ids.dim() == 1, "ids has shape ", shape_text(ids), "; expected [B]");
  check_same_device(ids, "ids", alpha, "alpha");
  const Tensor rows = checked_ids(ids, "ids", ids, "ids");
  const auto of_rows = [&](const Tensor& t, const char* name) {
    check_value(same_shape(t, ids), name, " has shape ", shape_text(t), "; ids has shape ", shape_text(ids),
                ", so the same is expected");
    check_same_device(t, name, alpha, "alpha");
    return to_contiguous(cast(t, alpha.scalar_type()));
  };
  const Tensor s = of_rows(successes, "successes"), n = of_rows(rollouts, "n");
  alpha.scalar_type() == ScalarType::Double ? update<double>(alpha, beta, rows, s, n, lam1, lam2)
                                            : update<float>(alpha, beta, rows, s, n, lam1, lam2);
}

}  // namespace prefkern
