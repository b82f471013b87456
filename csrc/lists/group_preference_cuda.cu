// The CUDA walk of group_preference.h: a warp takes a row.
#include "core/cuda.cuh"
#include "lists/group_preference.h"
#include "lists/row_loss.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 128, kRows = kThreads / kWarp;

__device__ __forceinline__ float sum(float x) { return warp_reduce(x, Add()); }

__device__ __forceinline__ void one_row(const GroupPreferenceArgs<float>& a, int64_t b, int lane) {
  const int64_t row = b * a.items;
  const auto counts = [&](int64_t i) { return !a.mask || a.mask[row + i] != 0; };
  float winners = 0, losers = 0, winner_sum = 0, loser_sum = 0;
  for (int64_t i = lane; i < a.items; i += kWarp) {
    if (!counts(i)) continue;
    const bool wins = a.winner[row + i] != 0;
    (wins ? winners : losers) += 1;
    (wins ? winner_sum : loser_sum) += a.scores[row + i];
  }
  winners = sum(winners), losers = sum(losers), winner_sum = sum(winner_sum), loser_sum = sum(loser_sum);
  const bool both = winners > 0 && losers > 0;
  if (!both) winners = losers = 1;
  const float winner_mean = winner_sum / winners, loser_mean = loser_sum / losers;
  float squares = 0;
  for (int64_t i = lane; i < a.items; i += kWarp) {
    if (!counts(i) || !a.winner[row + i]) continue;
    const float d = a.scores[row + i] - winner_mean;
    squares += d * d;
  }
  const auto g = group_preference<float, float>(a.rule, winners, losers, winner_mean, loser_mean, sum(squares));
  if (lane == 0) leave_row(a.out, b, both ? g.loss : 0.0f, both, both ? g.preference : 0.0f, both ? g.variance : 0.0f);
  if (!a.unnormalised) return;
  for (int64_t i = lane; i < a.items; i += kWarp) {
    float grad = 0;
    if (both && counts(i)) grad = a.winner[row + i] ? g.winner + g.winner_slope * (a.scores[row + i] - winner_mean) : g.loser;
    a.unnormalised[row + i] = grad;
  }
}

__global__ void __launch_bounds__(kThreads) rows_kernel(const GroupPreferenceArgs<float> a) {
  const int64_t b = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (b < a.out.rows) one_row(a, b, threadIdx.x % kWarp);  // a whole warp at a time
  finish_rows_on_device<kThreads>(a.out);
}

}  // namespace

int cuda_group_preference(const GroupPreferenceArgs<float>& a, void* stream) {
  if (a.out.rows == 0) return 0;
  PK_LAUNCH(rows_kernel, dim3(static_cast<unsigned>(ceil_div(a.out.rows, kRows))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
