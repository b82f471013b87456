// The CUDA walk of pair_errors.h: a block takes a slice of a pair, winner and loser together, so that a target they share is
// loaded once. A thread adds up to 32 elements in float, the block its threads' sums in double; the block that finishes last (an
// integer counter tells) adds slices and pairs in a fixed order. One launch, equal bits every time.
#include "diffusion/latents.cuh"
#include "diffusion/pair_errors.h"

namespace prefkern {
namespace {

constexpr int kWarps = kLatentThreads / kWarp;

struct Side {
  float square = 0, change = 0;
};

template <bool REF, int P>
__device__ __forceinline__ void add(Side& s, const float (&pred)[P], const float (&target)[P], const float (&ref)[P]) {
#pragma unroll
  for (int j = 0; j < P; j++) {
    const float d = pred[j] - target[j];
    s.square += d * d;
    if (REF) s.change += error_change(pred[j], ref[j], target[j], d);
  }
}

template <class T, bool REF> __device__ __forceinline__ void slice_sums(const DiffusionPairArgs<float>& a) {
  const LatentSlice s = latent_slice(a.length);
  const bool both = a.pred_l.data != nullptr,
             shared = a.target_w.data == a.target_l.data && a.target_w.stride == a.target_l.stride;
  const T *pred_w = latent_row<T>(a.pred_w, s.row), *target_w = latent_row<T>(a.target_w, s.row);
  const T *pred_l = both ? latent_row<T>(a.pred_l, s.row) : nullptr,
          *target_l = both ? latent_row<T>(a.target_l, s.row) : nullptr;
  const T *ref_w = REF ? latent_row<T>(a.ref_w, s.row) : nullptr, *ref_l = REF ? latent_row<T>(a.ref_l, s.row) : nullptr;
  const bool in_w = rows_aligned<T>(a.pred_w), in_l = rows_aligned<T>(a.pred_l), to_w = rows_aligned<T>(a.target_w),
             to_l = rows_aligned<T>(a.target_l), of_w = rows_aligned<T>(a.ref_w), of_l = rows_aligned<T>(a.ref_l);
  Side w, l;
  each_run<T>(s, [&](int64_t at) {
    LatentPack<T> pred, target, ref = {};
    load_elements(pred_w, at, s.end, in_w, pred);
    load_elements(target_w, at, s.end, to_w, target);
    if (REF) load_elements(ref_w, at, s.end, of_w, ref);
    add<REF>(w, pred, target, ref);
    if (!both) return;
    load_elements(pred_l, at, s.end, in_l, pred);
    if (!shared) load_elements(target_l, at, s.end, to_l, target);
    if (REF) load_elements(ref_l, at, s.end, of_l, ref);
    add<REF>(l, pred, target, ref);
  });
  const double sums[kDiffusionSums] = {double(w.square), double(w.change), double(l.square), double(l.change)};
  for (int k = 0; k < kDiffusionSums; k++) {
    const double sum = block_reduce<kLatentThreads>(sums[k], 0.0, Add());
    if (threadIdx.x == 0) a.sums[int64_t(blockIdx.x) * kDiffusionSums + k] = sum;
  }
}

// A warp takes a pair at a time.
__device__ __forceinline__ void finish(const DiffusionPairArgs<float>& a) {
  const int64_t slices = ceil_div(a.length, kCudaSlice);
  const int lane = threadIdx.x % kWarp;
  const volatile double* from = a.sums;  // other blocks' writes: not from a stale cache line
  PairTotals totals;
  for (int64_t b = threadIdx.x / kWarp; b < a.pairs; b += kWarps) {
    double sums[kDiffusionSums] = {};
    for (int64_t i = b * slices + lane; i < (b + 1) * slices; i += kWarp)
      for (int k = 0; k < kDiffusionSums; k++) sums[k] += from[i * kDiffusionSums + k];
    for (int k = 0; k < kDiffusionSums; k++) sums[k] = warp_sum(sums[k]);
    if (lane != 0) continue;
    if (a.errors) {
      a.errors[b] = sums[kSquareW] / double(a.length);
      continue;
    }
    const PairResult<float> r = pair_result(a, b, sums);
    a.slopes[b] = float(r.term.slope);
    if (a.reduction == LatentReduction::none) a.loss[b] = float(r.term.loss);
    add_pair(totals, r);
  }
  if (a.errors) return;
  __syncwarp();
  totals.loss = block_reduce<kLatentThreads>(totals.loss, 0.0, Add());
  for (int k = 0; k < kDiffusionMetrics; k++) totals.metrics[k] = block_reduce<kLatentThreads>(totals.metrics[k], 0.0, Add());
  if (threadIdx.x == 0) finish_pairs(a, totals);
}

template <class T, bool REF> __global__ void __launch_bounds__(kLatentThreads) pairs_kernel(const DiffusionPairArgs<float> a) {
  slice_sums<T, REF>(a);
  if (last_block(a.finished)) finish(a);
}

template <class T> __global__ void __launch_bounds__(kLatentThreads) gradient_kernel(const DiffusionGradArgs<float> a) {
  const LatentSlice s = latent_slice(a.length);
  const bool shared = a.target_w.data == a.target_l.data && a.target_w.stride == a.target_l.stride;
  const float factor = float(gradient_factor(a, s.row));
  T* grads[2] = {static_cast<T*>(a.grad_w), static_cast<T*>(a.grad_l)};
  const LatentRows preds[2] = {a.pred_w, a.pred_l}, targets[2] = {a.target_w, a.target_l};
  bool in[2], of[2], to[2];
  for (int k = 0; k < 2; k++) {
    in[k] = rows_aligned<T>(preds[k]);
    of[k] = rows_aligned<T>(targets[k]);
    to[k] = rows_aligned<T>({grads[k], a.length});
    if (grads[k]) grads[k] += s.row * a.length;
  }
  each_run<T>(s, [&](int64_t at) {
    LatentPack<T> pred, target;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (!grads[k]) continue;
      load_elements(latent_row<T>(preds[k], s.row), at, s.end, in[k], pred);
      if (k == 0 || !shared || !grads[0]) load_elements(latent_row<T>(targets[k], s.row), at, s.end, of[k], target);
      LatentPack<T> out;
#pragma unroll
      for (int j = 0; j < kPackSize<T>; j++) out[j] = (pred[j] - target[j]) * (k == 0 ? factor : -factor);
      store_elements(grads[k], at, s.end, to[k], out);
    }
  });
}

dim3 grid_of(int64_t rows, int64_t length) { return dim3(static_cast<unsigned>(rows * ceil_div(length, kCudaSlice))); }

template <class T> int sums(const DiffusionPairArgs<float>& a, cudaStream_t stream) {
  const dim3 grid = grid_of(a.pairs, a.length), block(kLatentThreads);
  if (a.ref_w.data) PK_LAUNCH((pairs_kernel<T, true>), grid, block, stream, a);
  else PK_LAUNCH((pairs_kernel<T, false>), grid, block, stream, a);
  return static_cast<int>(cudaGetLastError());
}
template <class T> int gradient(const DiffusionGradArgs<float>& a, cudaStream_t stream) {
  PK_LAUNCH(gradient_kernel<T>, grid_of(a.pairs, a.length), dim3(kLatentThreads), stream, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_diffusion_pairs(const DiffusionPairArgs<float>& a, void* stream) {
  if (a.pairs == 0 || a.length == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::f32: return sums<float>(a, s);
    case DType::bf16: return sums<bf16_t>(a, s);
    case DType::f16: return sums<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

int cuda_diffusion_pairs_backward(const DiffusionGradArgs<float>& a, void* stream) {
  if (a.pairs == 0 || a.length == 0 || !(a.grad_w || a.grad_l)) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::f32: return gradient<float>(a, s);
    case DType::bf16: return gradient<bf16_t>(a, s);
    case DType::f16: return gradient<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace prefkern
