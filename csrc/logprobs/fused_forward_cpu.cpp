#include "logprobs/fused_forward_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

// max, s, u of every lane, and the target's logit.
constexpr int64_t kLaneState = 4 * kLanes;
constexpr float kLowest = -0x1.fffffep127f;  // instead of -inf, from which a logit of -inf could not be subtracted
constexpr int kUnroll = 4;

struct LaneRow {
  VecF max, s, u;
};
PK_HD LaneRow load_lanes(const float* p) {
  return {Mem<VecF>::load(p), Mem<VecF>::load(p + kLanes), Mem<VecF>::load(p + 2 * kLanes)};
}
PK_HD void store_lanes(float* p, const LaneRow& r) {
  Mem<VecF>::store(p, r.max);
  Mem<VecF>::store(p + kLanes, r.s);
  Mem<VecF>::store(p + 2 * kLanes, r.u);
}

void begin(const LaneFoldArgs& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    float* p = a.lanes + row * kLaneState;
    store_lanes(p, {splat<VecF>(kLowest), VecF{}, VecF{}});
    p[3 * kLanes] = __builtin_nanf("");
  }
}

PK_HD VecF lane_clamp(VecF t) { return vmax_nan(splat<VecF>(kFlushExponent), t); }

template <bool ENTROPY> PK_HD void add(VecF& s, VecF& u, VecF x, VecF max, VecF factor) {
  const VecF t = lane_clamp((x - max) * factor), e = exp2_flush(t);
  s += e;
  if (ENTROPY) u += e * t;
}

template <bool ENTROPY> void fold_row(const LaneFoldArgs& a, int64_t row) {
  const FoldArgs<float>& f = a.fold;
  const LogitBlock<float>& b = f.block;
  if (b.targets[row] == b.ignore_index) return;
  const float* x = static_cast<const float*>(f.logits) + row_offset(f.logits_map, row);
  float* p = a.lanes + row * kLaneState;
  const int64_t target = b.targets[row] - b.first_col, n = b.cols, whole = n - n % kLanes;
  if (target >= 0 && target < n) p[3 * kLanes] = x[target];
  const VecF factor = splat<VecF>(logit_factor(b.transform, row) * float(kLog2E));
  LaneRow r = load_lanes(p);
  // What is left over fills up a vector of its own.
  VecF rest = splat<VecF>(-__builtin_inff());
  for (int64_t i = whole; i < n; i++) rest[i - whole] = x[i];

  VecF high[kUnroll];
  for (VecF& h : high) h = r.max;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= whole; i += kUnroll * kLanes)
    for (int j = 0; j < kUnroll; j++) high[j] = vmax(Mem<VecF>::load(x + i + j * kLanes), high[j]);
  for (; i < whole; i += kLanes) high[0] = vmax(Mem<VecF>::load(x + i), high[0]);
  high[0] = vmax(rest, high[0]);
  const VecF max = vmax(vmax(high[0], high[1]), vmax(high[2], high[3]));
  const VecF shift = lane_clamp((r.max - max) * factor), ratio = exp2_flush(shift);
  VecF s[kUnroll] = {r.s * ratio}, u[kUnroll] = {(r.u + r.s * shift) * ratio};
  for (i = 0; i + kUnroll * kLanes <= whole; i += kUnroll * kLanes)
    for (int j = 0; j < kUnroll; j++) add<ENTROPY>(s[j], u[j], Mem<VecF>::load(x + i + j * kLanes), max, factor);
  for (; i < whole; i += kLanes) add<ENTROPY>(s[0], u[0], Mem<VecF>::load(x + i), max, factor);
  if (whole < n) add<ENTROPY>(s[1], u[1], rest, max, factor);
  store_lanes(p, {max, (s[0] + s[1]) + (s[2] + s[3]), (u[0] + u[1]) + (u[2] + u[3])});
}

void fold(const LaneFoldArgs& a, int64_t first, int64_t last) {
  const auto run = a.fold.entropy ? &fold_row<true> : &fold_row<false>;
  for (int64_t row = first; row < last; row++) run(a, row);
}

void end(const LaneFoldArgs& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const float* p = a.lanes + row * kLaneState;
    const LaneRow r = load_lanes(p);
    const float factor = logit_factor(a.fold.block.transform, row) * float(kLog2E), high = reduce_max(r.max);
    const VecF shift = lane_clamp((r.max - high) * factor), ratio = exp2_flush(shift);
    const float none = high == kLowest ? kMinusInf<float> : high;
    store_state(a.fold, row,
                SoftmaxRow<float>{none, reduce_add(r.s * ratio), reduce_add((r.u + r.s * shift) * ratio), 0, 0, p[3 * kLanes],
                                  kMinusInf<float>});
  }
}

}  // namespace

extern const FusedForwardCpu fused_forward_cpu;
const FusedForwardCpu fused_forward_cpu = {kLaneState, &begin, &fold, &end};

}  // namespace PK_ISA
}  // namespace prefkern
