// lpg_inner_loss, its gradients, and the gradients of those.
#include <cmath>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "meta/checks.h"
#include "meta/inner_loss.h"
#include "meta/ops.h"

namespace prefkern {
namespace {

// The inputs of all three ops, checked and contiguous.
struct Inputs {
  Inputs(const Tensor& probs_in, const Tensor& actions_in, const Tensor& y_in, const Tensor& pi_hat_in, const Tensor& y_hat_in,
         double alpha, double sign)
      : rule{alpha, sign},
        dtype(checked(probs_in, y_in, pi_hat_in, rule)),
        probs(to_contiguous(probs_in)),
        y(alike(y_in, "y", y_in, "probs", probs_in)),
        pi_hat(alike(pi_hat_in, "pi_hat", pi_hat_in, "probs", probs_in)),
        y_hat(alike(y_hat_in, "y_hat", y_in, "y", y_in)),
        actions(checked_ids(actions_in, "actions", probs_in, "probs")) {
    check_same_device(actions_in, "actions", probs, "probs");
    if (!probs.is_cpu()) return;
    const int64_t *taken = data<int64_t>(actions), count = probs.size(1);
    for (int64_t i = 0; i < probs.size(0); i++)
      check_value(taken[i] >= 0 && taken[i] < count, "actions[", i, "] of the flattened rows is ", taken[i],
                  "; it must lie in [0, ", count, "), the actions that probs has");
  }

  int64_t blocks() const { return ceil_div(probs.size(0), kLpgBlock); }

  template <class S> LpgArgs<S> args() const {
    LpgArgs<S> a;
    a.rule = rule;
    a.rows = probs.size(0);
    a.actions = probs.size(1);
    a.width = y.size(1);
    a.probs = data<S>(probs);
    a.taken = data<int64_t>(actions);
    a.y = data<S>(y);
    a.target = data<S>(y_hat);
    a.adjustment = data<S>(pi_hat);
    return a;
  }

  LpgRule rule;
  DType dtype;
  Tensor probs, y, pi_hat, y_hat, actions;

 private:
  static DType checked(const Tensor& probs, const Tensor& y, const Tensor& pi_hat, const LpgRule& rule) {
    const DType dtype = computed_type(probs, "probs");
    check_value(std::isfinite(rule.alpha), "alpha_y is ", rule.alpha, "; it must be finite");
    check_value(rule.sign == 1 || rule.sign == -1, "sign is ", rule.sign, "; accepted: 1, -1");
    check_value(probs.dim() == 2 && probs.size(1) > 0, "probs has shape ", shape_text(probs),
                "; expected [N, A] with at least one action");
    check_value(probs.size(0) > 0, "probs has shape ", shape_text(probs), "; a mean needs at least one row");
    check_value(y.dim() == 2 && y.size(0) == probs.size(0), "y has shape ", shape_text(y), "; probs has shape ",
                shape_text(probs), ", so [", probs.size(0), ", W] is expected");
    check_value(pi_hat.dim() == 1 && pi_hat.size(0) == probs.size(0), "pi_hat has shape ", shape_text(pi_hat),
                "; probs has shape ", shape_text(probs), ", so [", probs.size(0), "] is expected");
    return dtype;
  }
};

// Sums of blocks, with the counter behind them that a CUDA kernel finds at 0.
struct Scratch {
  explicit Scratch(const Inputs& in)
      : blocks(in.blocks()),
        sums(in.probs.is_cuda() ? zeros({blocks * kLpgSums + 1}, ScalarType::Double, in.probs)
                                : empty({blocks * kLpgSums + 1}, ScalarType::Double, in.probs)) {}
  template <class S> void fill(LpgArgs<S>& a) const {
    a.sums = mutable_data<double>(sums);
    a.finished = reinterpret_cast<uint32_t*>(a.sums + blocks * kLpgSums);
  }
  int64_t blocks;
  Tensor sums;
};

struct Gradients {
  Gradients(const Inputs& in, int64_t needs)
      : needs(checked(needs)),
        probs(make(in.probs, kNeedsProbs)),
        y(make(in.y, kNeedsY)),
        pi_hat(make(in.pi_hat, kNeedsAdjustment)),
        y_hat(make(in.y_hat, kNeedsTarget)) {}
  template <class S> void fill(LpgArgs<S>& a) const {
    const auto at = [&](const Tensor& t, int64_t bit) { return needs & bit ? mutable_data<S>(t) : nullptr; };
    a.probs_grad = at(probs, kNeedsProbs);
    a.y_grad = at(y, kNeedsY);
    a.adjustment_grad = at(pi_hat, kNeedsAdjustment);
    a.target_grad = at(y_hat, kNeedsTarget);
  }
  int64_t needs;
  Tensor probs, y, pi_hat, y_hat;

 private:
  static int64_t checked(int64_t needs) {
    check_value(needs >= 0 && needs < 16, "needs is ", needs, "; accepted: 0 to 15");
    return needs;
  }
  Tensor make(const Tensor& like, int64_t bit) const {
    return needs & bit ? torch::stable::empty_like(like) : empty({0}, like.scalar_type(), like);
  }
};

Tensor checked_upstream(const Tensor& g, const Inputs& in) {
  check_value(g.numel() == 1, "g has shape ", shape_text(g), "; one element is expected");
  return alike(g, "g", g, "probs", in.probs);
}

OptTensor checked_above(const OptTensor& t, const char* name, const Tensor& like, const char* like_name) {
  return t ? OptTensor(alike(*t, name, like, like_name, like)) : t;
}

}  // namespace

std::tuple<Tensor, Tensor> lpg_inner_loss(const Tensor& probs, const Tensor& actions, const Tensor& y, const Tensor& pi_hat,
                                          const Tensor& y_hat, double alpha, double sign) {
  const OnDevice guard(probs);
  const Inputs in(probs, actions, y, pi_hat, y_hat, alpha, sign);
  const Scratch scratch(in);
  const ScalarType st = probs.scalar_type();
  const Tensor loss = empty({}, st, probs), terms = empty({2}, st, probs);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.out)>;
    scratch.fill(a);
    a.out = mutable_data<S>(loss);
    a.terms = mutable_data<S>(terms);
    return a;
  };
  if (in.dtype == DType::f64) cpu_lpg_loss(filled(in.args<double>()));
  else if (probs.is_cuda()) check_cuda(cuda_lpg_loss(filled(in.args<float>()), current_stream(probs)));
  else cpu_lpg_loss(filled(in.args<float>()));
  return {loss, terms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lpg_inner_loss_backward(const Tensor& g, const Tensor& probs, const Tensor& actions,
                                                                   const Tensor& y, const Tensor& pi_hat, const Tensor& y_hat,
                                                                   double alpha, double sign, int64_t needs) {
  const OnDevice guard(probs);
  const Inputs in(probs, actions, y, pi_hat, y_hat, alpha, sign);
  const Tensor upstream = checked_upstream(g, in);
  const Gradients grads(in, needs);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.out)>;
    a.upstream = data<S>(upstream);
    grads.fill(a);
    return a;
  };
  if (in.dtype == DType::f64) cpu_lpg_gradients(filled(in.args<double>()));
  else if (probs.is_cuda()) check_cuda(cuda_lpg_gradients(filled(in.args<float>()), current_stream(probs)));
  else cpu_lpg_gradients(filled(in.args<float>()));
  return {grads.probs, grads.y, grads.pi_hat, grads.y_hat};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lpg_inner_loss_second(OptTensor above_probs, OptTensor above_y,
                                                                         OptTensor above_pi_hat, OptTensor above_y_hat,
                                                                         const Tensor& g, const Tensor& probs,
                                                                         const Tensor& actions, const Tensor& y,
                                                                         const Tensor& pi_hat, const Tensor& y_hat,
                                                                         double alpha, double sign, int64_t needs) {
  const OnDevice guard(probs);
  const Inputs in(probs, actions, y, pi_hat, y_hat, alpha, sign);
  const Tensor upstream = checked_upstream(g, in), by_upstream = empty({}, probs.scalar_type(), probs);
  above_probs = checked_above(above_probs, "above_probs", in.probs, "probs");
  above_y = checked_above(above_y, "above_y", in.y, "y");
  above_pi_hat = checked_above(above_pi_hat, "above_pi_hat", in.pi_hat, "pi_hat");
  above_y_hat = checked_above(above_y_hat, "above_y_hat", in.y_hat, "y_hat");
  const Gradients grads(in, needs);
  const Scratch scratch(in);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.out)>;
    scratch.fill(a);
    grads.fill(a);
    a.upstream = data<S>(upstream);
    a.above_probs = data_or_null<S>(above_probs);
    a.above_y = data_or_null<S>(above_y);
    a.above_adjustment = data_or_null<S>(above_pi_hat);
    a.above_target = data_or_null<S>(above_y_hat);
    a.out = mutable_data<S>(by_upstream);
    return a;
  };
  if (in.dtype == DType::f64) cpu_lpg_second(filled(in.args<double>()));
  else if (probs.is_cuda()) check_cuda(cuda_lpg_second(filled(in.args<float>()), current_stream(probs)));
  else cpu_lpg_second(filled(in.args<float>()));
  return {by_upstream, grads.probs, grads.y, grads.pi_hat, grads.y_hat};
}

}  // namespace prefkern
