// The CUDA walk of group_folds.h: one launch each, no atomics, no scratch memory. Without sorted ids a warp takes a row and
// goes through the group of that row; with them it takes a group and writes all of its rows.
#include "core/groups.cuh"
#include "groups/group_folds.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

// What is done with a group: `look` is called by a warp that goes through the members, `write` for each row to write.
struct Reduce {
  using Args = GroupReduceArgs<float>;
  using Result = float;

  template <class Members> static __device__ __forceinline__ Result look(const Args& a, const Members& members, int lane) {
    GroupFold f;
    members.for_members(lane, [&](int64_t row) {
      if (!a.mask || a.mask[row] != 0) fold(f, double(a.values[row]));
    });
    f.n = warp_sum(f.n);
    f.nans = warp_sum(f.nans);
    f.sum = warp_sum(f.sum);
    for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
      f.min = vmin(__shfl_xor_sync(kAll, f.min, offset), f.min);
      f.max = vmax(__shfl_xor_sync(kAll, f.max, offset), f.max);
    }
    const double center = fold_center(a.reduction, f);
    double second = 0;
    if (needs_second_look(a.reduction)) {
      members.for_members(lane, [&](int64_t row) {
        if (!a.mask || a.mask[row] != 0) second += second_term(a.reduction, center, double(a.values[row]));
      });
      second = warp_sum(second);
    }
    return float(reduced(a.reduction, f, center, second));
  }
  static __device__ __forceinline__ void write(const Args& a, int64_t row, Result r) { a.result[row] = r; }
};

struct Normalize {
  using Args = NormalizeArgs<float>;
  using Result = Normalizer;

  template <class Members> static __device__ __forceinline__ Result look(const Args& a, const Members& members, int lane) {
    double n = 0, sum = 0, deviations = 0, squares = 0;
    members.for_members(lane, [&](int64_t row) {
      n += 1;
      sum += double(a.x[row]);
    });
    n = warp_sum(n);
    const double near = warp_sum(sum) / n;
    members.for_members(lane, [&](int64_t row) { deviations += double(a.x[row]) - near; });
    const double mean = near + warp_sum(deviations) / n;
    members.for_members(lane, [&](int64_t row) {
      const double d = double(a.x[row]) - mean;
      squares += d * d;
    });
    return normalizer(a.rule, n, mean, warp_sum(squares));
  }
  static __device__ __forceinline__ void write(const Args& a, int64_t row, const Result& g) {
    a.z[row] = float(normalized(g, double(a.x[row])));
    a.scale[row] = float(g.scale);
    a.slope[row] = float(g.slope);
  }
};

struct NormalizeBackward {
  using Args = NormalizeGradArgs<float>;
  struct Result {
    double mean, sum_z;
  };

  template <class Members> static __device__ __forceinline__ Result look(const Args& a, const Members& members, int lane) {
    double n = 0, sum = 0, sum_z = 0;
    members.for_members(lane, [&](int64_t row) {
      n += 1;
      sum += double(a.upstream[row]);
      sum_z += double(a.upstream[row]) * double(a.z[row]);
    });
    n = warp_sum(n);
    return {warp_sum(sum) / n, warp_sum(sum_z)};
  }
  static __device__ __forceinline__ void write(const Args& a, int64_t row, const Result& r) {
    a.grad[row] = float(
        normalize_grad(double(a.upstream[row]), double(a.z[row]), double(a.scale[row]), double(a.slope[row]), r.mean, r.sum_z));
  }
};

__device__ __forceinline__ int64_t warp_index() { return int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; }

template <class Task> __global__ void __launch_bounds__(kThreads) scan_kernel(const typename Task::Args a) {
  const int64_t row = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (row >= a.rows.count) return;  // a whole warp at a time
  const auto result = Task::look(a, ScannedMembers{a.rows.ids, a.rows.count, a.rows.ids[row]}, lane);
  if (lane == 0) Task::write(a, row, result);
}

template <class Task> __global__ void __launch_bounds__(kThreads) sorted_kernel(const typename Task::Args a) {
  const int64_t begin = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (begin >= a.rows.count || !group_begins(a.rows.ids, begin)) return;
  const SortedMembers members{a.rows.order, begin, group_end(a.rows.ids, a.rows.count, begin)};
  const auto result = Task::look(a, members, lane);
  members.for_members(lane, [&](int64_t row) { Task::write(a, row, result); });
}

template <class Task> int launch(const typename Task::Args& a, void* stream) {
  if (a.rows.count == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows.count, kThreads / kWarp)));
  if (a.rows.order) PK_LAUNCH(sorted_kernel<Task>, grid, dim3(kThreads), s, a);
  else PK_LAUNCH(scan_kernel<Task>, grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_group_reduce(const GroupReduceArgs<float>& a, void* stream) { return launch<Reduce>(a, stream); }
int cuda_group_normalize(const NormalizeArgs<float>& a, void* stream) { return launch<Normalize>(a, stream); }
int cuda_group_normalize_backward(const NormalizeGradArgs<float>& a, void* stream) {
  return launch<NormalizeBackward>(a, stream);
}

}  // namespace prefkern
