#include "logprobs/cuda_forward.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace prefkern {
namespace {

// Stage 2 was at least 5 % faster for hidden rows of up to max_width elements, from that many rows and tokens on.
struct Win {
  int64_t max_width, min_rows, min_vocab;
};
// Not measured yet: no entries.
constexpr const Win* kMeasuredWins = nullptr;
constexpr int kMeasuredWinCount = 0;

using Names = const char* const[3];
constexpr Names kForwardNames = {"auto", "stage1", "stage2"}, kBackwardNames = {"auto", "dense", "compact"};

template <class Path> Path from_environment(const char* variable, const Names& names) {
  const char* wanted = std::getenv(variable);
  for (int32_t i = 0; wanted && i < 3; i++)
    if (!std::strcmp(wanted, names[i])) return Path(i);
  return Path::automatic;  // of other values the package complains when it is imported
}

std::atomic<CudaForward>& forward() {
  static std::atomic<CudaForward> path{from_environment<CudaForward>("PREFKERN_CUDA_FORWARD", kForwardNames)};
  return path;
}

std::atomic<CudaBackward>& backward() {
  static std::atomic<CudaBackward> path{from_environment<CudaBackward>("PREFKERN_CUDA_BACKWARD", kBackwardNames)};
  return path;
}

}  // namespace

CudaForward cuda_forward() { return forward().load(std::memory_order_relaxed); }
void set_cuda_forward(CudaForward path) { forward().store(path, std::memory_order_relaxed); }
const char* cuda_forward_name(CudaForward path) { return kForwardNames[static_cast<int32_t>(path)]; }

CudaBackward cuda_backward() { return backward().load(std::memory_order_relaxed); }
void set_cuda_backward(CudaBackward path) { backward().store(path, std::memory_order_relaxed); }
const char* cuda_backward_name(CudaBackward path) { return kBackwardNames[static_cast<int32_t>(path)]; }

bool stage2_measured_ahead(int64_t rows, int64_t width, int64_t vocab) {
  for (int i = 0; i < kMeasuredWinCount; i++) {
    const Win& win = kMeasuredWins[i];
    if (width <= win.max_width && rows >= win.min_rows && vocab >= win.min_vocab) return true;
  }
  return false;
}

}  // namespace prefkern
