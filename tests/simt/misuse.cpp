#include "misuse.h"

#include <map>

#include "simt.h"

namespace {

constexpr unsigned kSlots = 64;
constexpr unsigned kAll = 0xffffffffu;

// Each thread hands its number to the next one.
template <bool BARRIER> __global__ void neighbour(float* out) {
  PK_SMEM(float, slots, 1024);
  const unsigned t = threadIdx.x;
  slots[t] = static_cast<float>(t);
  if (BARRIER) __syncthreads();
  out[t] = slots[(t + 1) % blockDim.x];
}

template <bool BARRIER> __global__ void neighbour_in_warp(float* out) {
  PK_SMEM(float, slots, 1024);
  const unsigned t = threadIdx.x;
  slots[t] = static_cast<float>(t);
  if (BARRIER) __syncwarp();
  out[t] = slots[t / 32 * 32 + (t + 1) % 32];
}

__global__ void two_barriers(float*) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  else __syncthreads();
}

__global__ void barrier_against_shuffle(float*) {
  if (threadIdx.x == 0) __syncthreads();
  else __syncwarp();
}

__global__ void barrier_after_exit(float* out) {  // allowed: threads that have exited do not count
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <int OFFSET> __global__ void write_at(float*) {
  PK_SMEM(float, slots, kSlots);
  float* p = slots;
  if (threadIdx.x == 0) p[OFFSET] = 1;
}

__global__ void read_unwritten(float* out) {
  PK_SMEM(float, slots, kSlots);
  out[threadIdx.x] = slots[threadIdx.x % kSlots];
}

__global__ void too_much_shared(float* out) {
  PK_SMEM(float, slots, 12289);
  out[0] = slots[0];
}

__global__ void caller_not_in_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

__global__ void lane_absent(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void lane_leaves(float* out) {
  if (threadIdx.x == 31) return;  // in forward order: after the others have begun to wait
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void masks_differ(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 < 16 ? 0x00ffffffu : 0xffffff00u, 1.0f, 1);
}

__global__ void operations_differ(float* out) {
  out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(kAll, 1.0f, 1) : __shfl_down_sync(kAll, 1.0f, 1);
}

__global__ void source_not_in_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void misaligned_load(float* out) {
  out[0] = static_cast<float>(__ldcs(reinterpret_cast<const uint4*>(reinterpret_cast<char*>(out) + 4)).x);
}

// The block that finishes last adds up what all of them wrote: out = [sum, number finished, one per thread ...].
template <bool BARRIER> __global__ void sum_by_the_last_block(float* out) {
  PK_SMEM(bool, is_last, 1);
  float* const written = out + 2;
  written[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (BARRIER) __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(reinterpret_cast<unsigned*>(out + 1), 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last[0] || threadIdx.x != 0) return;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; i++) out[0] += written[i];
}

// Half a warp works alone, then with the other half, which is still at its first operation.
__global__ void halves(float* out) {
  float v = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16)
    for (int offset = 8; offset > 0; offset >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, offset);
  out[threadIdx.x] = __shfl_sync(kAll, v, static_cast<int>(threadIdx.x) ^ 16);
}

// Every operation once; operation k writes out[k * threads + thread].
__global__ void warp_operations(float* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const double wide = lane + 0x1p-40;
  out += threadIdx.x;
  const auto write = [&](int value) {
    *out = static_cast<float>(value);
    out += blockDim.x;
  };
  write(__shfl_sync(kAll, lane, 5));
  write(__shfl_sync(kAll, lane, 1, 8));
  write(__shfl_xor_sync(kAll, lane, 3));
  write(__shfl_xor_sync(kAll, lane, 9, 8));
  write(__shfl_up_sync(kAll, lane, 2));
  write(__shfl_down_sync(kAll, lane, 2, 16));
  write(__shfl_xor_sync(kAll, wide, 1) == (lane ^ 1) + 0x1p-40);
  write(__popc(__ballot_sync(kAll, lane % 3 == 0)));
  write(static_cast<int>(__ballot_sync(kAll, lane == 4 || lane == 6)));
  write(__any_sync(kAll, lane == 7));
  write(__any_sync(kAll, lane == 32));
  write(__all_sync(kAll, lane < 32));
  write(__all_sync(kAll, lane != 7));
}

}  // namespace

void run_misuse(const std::string& name, unsigned blocks, unsigned threads, float* out) {
  static const std::map<std::string, void (*)(float*)> kernels = {
      {"neighbour", neighbour<true>},
      {"missing_barrier", neighbour<false>},
      {"neighbour_in_warp", neighbour_in_warp<true>},
      {"missing_warp_barrier", neighbour_in_warp<false>},
      {"sum_by_the_last_block", sum_by_the_last_block<true>},
      {"missing_barrier_before_the_count", sum_by_the_last_block<false>},
      {"two_barriers", two_barriers},
      {"barrier_against_shuffle", barrier_against_shuffle},
      {"barrier_after_exit", barrier_after_exit},
      {"write_last", write_at<kSlots - 1>},
      {"overrun", write_at<kSlots>},
      {"underrun", write_at<-1>},
      {"read_unwritten", read_unwritten},
      {"too_much_shared", too_much_shared},
      {"caller_not_in_mask", caller_not_in_mask},
      {"lane_absent", lane_absent},
      {"lane_leaves", lane_leaves},
      {"masks_differ", masks_differ},
      {"operations_differ", operations_differ},
      {"source_not_in_mask", source_not_in_mask},
      {"misaligned_load", misaligned_load},
      {"halves", halves},
      {"warp_operations", warp_operations},
  };
  PK_LAUNCH(kernels.at(name), dim3(blocks), dim3(threads), nullptr, out);
}
