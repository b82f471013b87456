// The CUDA walk of question_weights.h: a warp per row finds the difficulty of the row's question, then one block, which
// counts every question by its first row, turns difficulties into weights.
#include "advantages/moments.cuh"
#include "core/groups.cuh"
#include "advantages/question_weights.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kBlock = 512;

__global__ void __launch_bounds__(kThreads) difficulty_kernel(const QuestionArgs<float> a) {
  const int64_t at = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at >= a.count) return;
  with_members(a.group, a.order, a.count, at, [&](int64_t row, const auto& members) {
    double low = kInfinity, high = -kInfinity, sum = 0, n = 0, check = 0;
    int64_t first = a.count;
    members.for_members(lane, [&](int64_t i) {
      const double r = double(a.rewards[i]);
      low = r < low ? r : low;
      high = r > high ? r : high;
      sum += double(a.main[i]);
      check += 0.0 * r;
      n += 1;
      first = i < first ? i : first;
    });
    low = warp_reduce(low, [](double x, double y) { return x < y ? x : y; });
    high = warp_reduce(high, [](double x, double y) { return x > y ? x : y; });
    first = warp_reduce(first, [](int64_t x, int64_t y) { return x < y ? x : y; });
    n = warp_sum(n);
    sum = warp_sum(sum);
    check = warp_sum(check);
    if (lane != 0) return;
    const double mean = group_mean(sum, n) + check;  // NaN for what is not finite
    a.valid[row] = high - low > a.tol || mean != mean;
    a.difficulty[row] = question_difficulty(mean, a.temperature, a.tol, a.zero_as_easy);
    a.first[row] = first == row;
  });
}

__global__ void __launch_bounds__(kBlock) weights_kernel(const QuestionArgs<float> a) {
  double largest = -kInfinity, tokens = 0, valid_tokens = 0, questions = 0, all = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += kBlock) {
    const double n = !a.lengths ? 0.0 : a.lengths[i] < 0 ? __builtin_nan("") : double(a.lengths[i]);
    tokens += n;
    if (!a.valid[i]) continue;
    valid_tokens += n;
    largest = a.difficulty[i] > largest ? a.difficulty[i] : largest;
    if (a.first[i]) questions += 1;
  }
  largest = block_reduce<kBlock>(largest, -kInfinity, [](double x, double y) { return x > y ? x : y; });
  tokens = block_reduce<kBlock>(tokens, 0.0, Add{});
  valid_tokens = block_reduce<kBlock>(valid_tokens, 0.0, Add{});
  questions = block_reduce<kBlock>(questions, 0.0, Add{});
  for (int64_t i = threadIdx.x; i < a.count; i += kBlock)
    if (a.valid[i] && a.first[i]) all += exp(a.difficulty[i] - largest);
  all = block_reduce<kBlock>(all, 0.0, Add{});
  for (int64_t i = threadIdx.x; i < a.count; i += kBlock)
    a.weights[i] = a.valid[i] ? float(questions * exp(a.difficulty[i] - largest) / all) : 1.0f;
  if (threadIdx.x != 0) return;
  const bool scaled = a.lengths && questions > 0;
  const double scale = scaled ? (valid_tokens > 0 ? tokens / valid_tokens : __builtin_nan("")) : 1.0;
  *a.scale = float(scale + 0.0 * all);
}

}  // namespace

int cuda_question_weights(const QuestionArgs<float>& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.count > 0)
    PK_LAUNCH(difficulty_kernel, dim3(static_cast<unsigned>(ceil_div(a.count, kThreads / kWarp))), dim3(kThreads), s, a);
  PK_LAUNCH(weights_kernel, dim3(1), dim3(kBlock), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
