// The kernels of gemm_bounded.h: CUTLASS' cooperative kernel (TMA, wgmma, two warp groups per tile) with a scheduler of tiles that
// reads the bound. The bound is in whole clusters of tiles, so that all parts of a cluster agree; operands hold zeros beyond it.
#include "core/gemm_bounded.h"

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

namespace prefkern {
namespace {

using namespace cute;

using GridCluster = Shape<_2, _1, _1>;

// Tiles of a bounded product, for a grid of (2, clusters): a cluster takes every gridDim.y-th pair of tiles. Pairs next to each
// other lie along the shorter side of the product, and so share what they load.
template <class Tile, bool DEPTH> class BoundedScheduler : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;

 public:
  struct Arguments : Base::Arguments {
    const int64_t* count = nullptr;
    int64_t first = 0;
    bool accumulate = false;
  };
  struct Params : Base::Params {
    const int64_t* count = nullptr;
    int64_t first = 0;
    bool accumulate = false;
    int32_t m_pairs = 0, n_tiles = 0;
  };
  struct WorkTileInfo : Base::WorkTileInfo {
    int32_t k_tiles = 0;
  };

  template <class Problem, class Block, class Cluster>
  static Params to_underlying_arguments(Problem problem, Block block, Cluster cluster, const cutlass::KernelHardwareInfo& info,
                                        const Arguments& arguments, void* workspace = nullptr, uint32_t subtiles = 1,
                                        uint32_t alignment = 1) {
    Params p;
    static_cast<Base::Params&>(p) =
        Base::to_underlying_arguments(problem, block, cluster, info, arguments, workspace, subtiles, alignment);
    p.count = arguments.count;
    p.first = arguments.first;
    p.accumulate = arguments.accumulate;
    p.m_pairs = int32_t(cute::ceil_div(get<0>(problem), 2 * int(size<0>(Tile{}))));
    p.n_tiles = int32_t(cute::ceil_div(get<1>(problem), int(size<1>(Tile{}))));
    return p;
  }

  CUTLASS_DEVICE explicit BoundedScheduler(const Params& p) : Base(p), m_pairs_(p.m_pairs), n_tiles_(p.n_tiles) {
    const int64_t left = *p.count - p.first, count = left > 0 ? left : 0;
    if constexpr (DEPTH) {
      // The product always runs over one step at least: over zeros, where C must be written.
      const int64_t steps = (count + size<2>(Tile{}) - 1) / size<2>(Tile{});
      k_tiles_ = int32_t(steps > 0 ? steps : 1);
      if (count == 0 && p.accumulate) m_pairs_ = 0;
    } else {
      const int64_t pairs = (count + 2 * size<0>(Tile{}) - 1) / (2 * size<0>(Tile{}));
      m_pairs_ = int32_t(pairs < m_pairs_ ? pairs : m_pairs_);
    }
    at_ = blockIdx.y;
  }

  CUTLASS_DEVICE WorkTileInfo get_current_work() const {
    WorkTileInfo work;
    if (at_ >= int64_t(m_pairs_) * n_tiles_) return work;  // not valid
    const bool rows_first = m_pairs_ < n_tiles_;
    const int32_t inner = rows_first ? m_pairs_ : n_tiles_, quick = int32_t(at_ % inner), slow = int32_t(at_ / inner);
    work.M_idx = 2 * (rows_first ? quick : slow) + int32_t(blockIdx.x);
    work.N_idx = rows_first ? slow : quick;
    work.is_valid_tile = true;
    work.k_tiles = k_tiles_;
    return work;
  }
  template <class Cluster> CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Cluster) { return get_current_work(); }
  CUTLASS_DEVICE void advance_to_next_work(uint32_t steps = 1) { at_ += int64_t(gridDim.y) * steps; }
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo) {
    advance_to_next_work();
    return cute::make_tuple(get_current_work(), true);
  }
  template <class Pipeline, class State> CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo work, Pipeline&, State) {
    return fetch_next_work(work);
  }
  template <class Problem, class Block>
  CUTLASS_HOST_DEVICE static int get_work_k_tile_count(const WorkTileInfo& work, Problem problem, Block block) {
    return DEPTH ? work.k_tiles : int(cute::ceil_div(get<2>(problem), get<2>(block)));
  }

 private:
  int32_t m_pairs_, n_tiles_, k_tiles_ = 0;
  int64_t at_;
};

template <bool DEPTH> struct BoundedTag {};

}  // namespace
}  // namespace prefkern

namespace cutlass::gemm::kernel::detail {
template <bool DEPTH, class Tile, class Cluster, uint32_t STAGES>
struct TileSchedulerSelector<prefkern::BoundedTag<DEPTH>, arch::Sm90, Tile, Cluster, STAGES> {
  using Scheduler = prefkern::BoundedScheduler<Tile, DEPTH>;
};
}  // namespace cutlass::gemm::kernel::detail

namespace prefkern {
namespace {

// Named outside of the template: nvcc writes what depends on a template's parameters in a form that g++ may not read.
using BoundedTile = Shape<_128, _128, _64>;
using BoundedEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BoundedTile, GridCluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, float, cutlass::layout::RowMajor, 4, float,
    cutlass::layout::RowMajor, 4, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
using BoundedStages = cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename BoundedEpilogue::SharedStorage))>;

template <BoundedProduct PRODUCT, class T> struct Bounded {
  static constexpr bool depth = PRODUCT == BoundedProduct::depth_tn, b_is_nk = PRODUCT == BoundedProduct::rows_nt;
  using LayoutA = conditional_t<depth, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using LayoutB = conditional_t<b_is_nk, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Mainloop =
      typename cutlass::gemm::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, LayoutA, 8,
                                                            T, LayoutB, 8, float, BoundedTile, GridCluster, BoundedStages,
                                                            cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, BoundedEpilogue, BoundedTag<depth>>;

  // [outer, inner] with adjacent inner elements, as the stride of (rows, depth) or (columns, depth).
  template <class Stride> static Stride stride_of(int64_t stride) {
    Stride s{};
    if constexpr (is_same_v<remove_cvref_t<decltype(get<1>(Stride{}))>, _1>) get<0>(s) = stride;
    else get<1>(s) = stride;
    return s;
  }

  static int launch(const BoundedGemmArgs& a, cudaStream_t stream) {
    typename Kernel::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {int(a.m), int(a.n), int(a.k), 1};
    args.mainloop.ptr_A = static_cast<const T*>(a.a);
    args.mainloop.dA = stride_of<typename Kernel::StrideA>(a.a_stride);
    args.mainloop.ptr_B = static_cast<const T*>(a.b);
    args.mainloop.dB = stride_of<typename Kernel::StrideB>(a.b_stride);
    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = a.accumulate ? 1.0f : 0.0f;
    args.epilogue.ptr_C = args.epilogue.ptr_D = a.c;
    args.epilogue.dC = stride_of<typename Kernel::StrideC>(a.c_stride);
    args.epilogue.dD = stride_of<typename Kernel::StrideD>(a.c_stride);
    args.scheduler.count = a.count;
    args.scheduler.first = a.first;
    args.scheduler.accumulate = a.accumulate;
    int device = 0, multiprocessors = 0;
    if (const auto error = cudaGetDevice(&device)) return error;
    if (const auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
    args.hw_info.device_id = device;
    args.hw_info.sm_count = multiprocessors;
    if (!Kernel::can_implement(args)) return cudaErrorInvalidValue;

    const auto kernel = &cutlass::device_kernel<Kernel>;
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize))
      return error;
    const typename Kernel::Params params = Kernel::to_underlying_arguments(args, nullptr);
    const int64_t pairs = int64_t(params.scheduler.m_pairs) * params.scheduler.n_tiles;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = size<0>(GridCluster{});
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2, unsigned(pairs < multiprocessors / 2 ? pairs : multiprocessors / 2), 1);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
  }
};

template <class T> int launch(const BoundedGemmArgs& a, cudaStream_t stream) {
  switch (a.product) {
    case BoundedProduct::rows_nt: return Bounded<BoundedProduct::rows_nt, T>::launch(a, stream);
    case BoundedProduct::rows_nn: return Bounded<BoundedProduct::rows_nn, T>::launch(a, stream);
    case BoundedProduct::depth_tn: return Bounded<BoundedProduct::depth_tn, T>::launch(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int cuda_gemm_bounded(const BoundedGemmArgs& a, void* stream) {
  if (a.m == 0 || a.n == 0) return 0;
  if (!gemm_bounded_takes(a)) return cudaErrorInvalidValue;
  const auto s = static_cast<cudaStream_t>(stream);
  return a.dtype == DType::bf16 ? launch<cutlass::bfloat16_t>(a, s) : launch<cutlass::half_t>(a, s);
}

}  // namespace prefkern
