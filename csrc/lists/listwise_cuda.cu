// The CUDA walk of listwise.h: a warp takes a list, a lane every 32nd of its items, which it compares to all others. A pair is
// looked at from both sides, and so nothing has to be added atomically. What items must know of each other (ranks, or what is
// below them) stands in scratch, three numbers each.
#include "core/cuda.cuh"
#include "lists/listwise.h"
#include "lists/row_loss.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 128, kLists = kThreads / kWarp;

struct List {
  const ListArgs<float>& a;
  int64_t row;
  float beta;

  __device__ __forceinline__ bool counts(int64_t i) const { return !a.mask || a.mask[row + i] != 0; }
  // Rounded, not fused with what follows: equal scores must stay equal.
  __device__ __forceinline__ float u(int64_t i) const { return rounded_product(beta, a.scores[row + i]); }
  __device__ __forceinline__ float given(int64_t i) const { return a.labels ? a.labels[row + i] : -float(i); }
  __device__ __forceinline__ float& scratch(int64_t i, int k) const { return a.scratch[(row + i) * 3 + k]; }
};

template <class F> __device__ __forceinline__ void each_item(const List& l, int lane, const F& f) {
  for (int64_t i = lane; i < l.a.items; i += kWarp)
    if (l.counts(i)) f(i);
}
template <class F> __device__ __forceinline__ void each_other(const List& l, const F& f) {
  for (int64_t j = 0; j < l.a.items; j++)
    if (l.counts(j)) f(j);
}
__device__ __forceinline__ float sum(float x) { return warp_reduce(x, Add()); }

// A list at a glance. Of equal scores the first is the highest.
struct Look {
  float items = 0, best = -float(__builtin_inf()), worst = float(__builtin_inf()), top = -float(__builtin_inf()), top_label = 0;
  bool valid = true;
};
__device__ __forceinline__ Look look(const List& l, int lane) {
  Look k;
  float first = 3e38f;
  each_item(l, lane, [&](int64_t i) {
    const float label = l.given(i), u = l.u(i);
    k.valid = k.valid && label_valid(l.a.rule, label);
    k.items += 1;
    k.best = vmax(label, k.best);
    k.worst = vmin(label, k.worst);
    if (u > k.top || first == 3e38f) k.top = u, first = float(i);
  });
  k.items = sum(k.items);
  k.valid = warp_reduce(k.valid ? 0.0f : 1.0f, Max()) == 0;
  k.best = warp_reduce(k.best, Max());
  k.worst = warp_reduce(k.worst, Min());
  const float top = warp_reduce(k.top, Max());
  first = warp_reduce(k.top == top ? first : 3e38f, Min());
  k.top = top;
  k.top_label = first < 3e38f ? l.given(int64_t(first)) : 0;
  return k;
}

template <ListKind kind> __device__ __forceinline__ float pairs(const List& l, int lane) {
  const ListRule& rule = l.a.rule;
  if (kind == ListKind::lambda) {
    const bool by_label = rule.rank == ListRank::labels;
    each_item(l, lane, [&](int64_t i) {
      const float mine = by_label ? l.given(i) : l.u(i);
      float rank = 1;
      each_other(l, [&](int64_t j) {
        const float other = by_label ? l.given(j) : l.u(j);
        rank += j < i ? other >= mine : other > mine;
      });
      l.scratch(i, 0) = float(list_discount(double(rank)));
      l.scratch(i, 1) = list_gain(rule.gain, l.given(i));
    });
    __syncwarp();
  }
  float loss = 0, found = 0;
  each_item(l, lane, [&](int64_t i) {
    const float u = l.u(i), label = l.given(i);
    const float discount = kind == ListKind::lambda ? l.scratch(i, 0) : 0,
                gain = kind == ListKind::lambda ? l.scratch(i, 1) : 0;
    float grad = 0;
    each_other(l, [&](int64_t j) {
      const float other = l.given(j), difference = u - l.u(j);
      if (label == other) return;
      const bool wins = label > other;
      const auto p = list_pair_loss<kind>(wins ? difference : -difference);
      float weight = 1;
      if (kind == ListKind::lambda) weight = magnitude(gain - l.scratch(j, 1)) * magnitude(discount - l.scratch(j, 0));
      loss += wins ? p.nll * weight : 0.0f;
      found += wins;
      grad += wins ? -p.p * weight : p.p * weight;
    });
    if (l.a.unnormalised) l.a.unnormalised[l.row + i] = grad;
  });
  loss = sum(loss);
  if (!rule.per_pair) return loss;
  found = sum(found);
  const float share = 1 / (found > 0 ? found : 1.0f);
  if (l.a.unnormalised) each_item(l, lane, [&](int64_t i) { l.a.unnormalised[l.row + i] *= share; });
  return loss * share;
}

__device__ __forceinline__ float plackett_luce(const List& l, int lane) {
  float loss = 0;
  each_item(l, lane, [&](int64_t i) {
    const float u = l.u(i), label = l.given(i);
    ExpSum<float> lower;
    each_other(l, [&](int64_t j) { add_exp(lower, l.u(j), l.given(j) < label); });
    const bool none = lower.sum == 0;
    const float log_sum = none ? 0.0f : vlog(lower.sum);
    const auto g = logistic(luce_margin(u, lower.top, log_sum, none));
    loss += g.nll;
    l.scratch(i, 0) = lower.top;
    l.scratch(i, 1) = log_sum;
    l.scratch(i, 2) = g.p;
  });
  __syncwarp();
  if (l.a.unnormalised)
    each_item(l, lane, [&](int64_t i) {
      const float u = l.u(i), label = l.given(i);
      float grad = -l.scratch(i, 2);
      each_other(l, [&](int64_t j) {
        if (l.given(j) > label) grad += l.scratch(j, 2) * vexp((u - l.scratch(j, 0)) - l.scratch(j, 1));
      });
      l.a.unnormalised[l.row + i] = grad;
    });
  return sum(loss);
}

template <ListKind kind> __device__ __forceinline__ float softmax_list(const List& l, int lane, const Look& k) {
  const ListRule& rule = l.a.rule;
  const float inverse = float(1 / rule.temperature);
  const bool soft = rule.smoothing < 0 && kind != ListKind::lire;
  const auto exp_u = [&](int64_t i) { return vexp(l.u(i) - k.top); };
  const auto label_exp = [&](int64_t i) { return soft ? vexp((l.given(i) - k.best) * inverse) : 0.0f; };
  float exps = 0, label_exps = 0, best = 0;
  each_item(l, lane, [&](int64_t i) {
    exps += exp_u(i);
    label_exps += label_exp(i);
    best += l.given(i) == k.best;
  });
  const auto s = list_softmax<float, float>(rule, k.items, k.top, sum(exps), k.best, sum(label_exps), sum(best));
  const auto item = [&](int64_t i) { return list_item<kind>(rule, s, inverse, l.u(i), l.given(i), exp_u(i), label_exp(i)); };
  float loss = 0;
  each_item(l, lane, [&](int64_t i) { loss += item(i).loss; });
  loss = sum(loss);
  if (l.a.unnormalised)
    each_item(l, lane, [&](int64_t i) {
      const auto x = item(i);
      l.a.unnormalised[l.row + i] = x.slope - x.weight * loss;
    });
  return loss;
}

__device__ __forceinline__ float one_list(const List& l, int lane, const Look& k) {
  switch (l.a.rule.kind) {
    case ListKind::plackett_luce: return plackett_luce(l, lane);
    case ListKind::lambda: return pairs<ListKind::lambda>(l, lane);
    case ListKind::uniform: return pairs<ListKind::uniform>(l, lane);
    case ListKind::rrhf: return pairs<ListKind::rrhf>(l, lane);
    case ListKind::exo: return softmax_list<ListKind::exo>(l, lane, k);
    case ListKind::infonca: return softmax_list<ListKind::infonca>(l, lane, k);
    case ListKind::nca: return softmax_list<ListKind::nca>(l, lane, k);
    case ListKind::lire: return softmax_list<ListKind::lire>(l, lane, k);
  }
  return 0;
}

__global__ void __launch_bounds__(kThreads) lists_kernel(const ListArgs<float> a) {
  const int64_t b = int64_t(blockIdx.x) * kLists + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (b < a.out.rows) {  // a whole warp at a time
    const List l{a, b * a.items, float(a.rule.beta)};
    const Look k = look(l, lane);
    const bool compares = k.valid && k.best > k.worst;
    float loss = k.valid ? 0.0f : no_label();
    if (compares) loss = one_list(l, lane, k);
    if (a.unnormalised) {
      const float factor = l.beta;
      for (int64_t i = lane; i < a.items; i += kWarp) {
        const float g = !l.counts(i) ? 0.0f : !k.valid ? no_label() : compares ? a.unnormalised[l.row + i] * factor : 0.0f;
        a.unnormalised[l.row + i] = g;
      }
    }
    if (lane == 0)
      leave_row(a.out, b, loss, compares || !k.valid, compares && k.top_label == k.best, compares ? k.items : 0.0f);
  }
  finish_rows_on_device<kThreads>(a.out);
}

}  // namespace

int cuda_listwise(const ListArgs<float>& a, void* stream) {
  if (a.out.rows == 0) return 0;
  PK_LAUNCH(lists_kernel, dim3(static_cast<unsigned>(ceil_div(a.out.rows, kLists))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
