// The kernel of hopper_forward.h: CUTLASS' main loop (TMA loads by one warp, wgmma by two warp groups, a persistent grid) with an
// epilogue of this library. Compiled for 9.0a alone, and only where CUTLASS' headers were found.
//
// What the epilogue costs. Per logit, two instructions find the maximum and hide columns, six make exponential and sums, one of
// them on the special function unit, which does 16 per clock and multiprocessor: 64 clocks per 1024 logits. Those 1024 logits took
// the tensor cores H / 2 clocks (4096 flop per clock). At H = 4096 the exponentials are 3 % of the products, at 1024 they are 12.5 %,
// and with reading and writing of logits, as a fold from memory needs it, would be most of what there is. So for small H the
// epilogue has to run beside the products:
//
//   ping-pong, 128 x 192: each warp group has a tile of its own; while one folds, the other multiplies. The accumulators take 192
//   of a thread's 232 registers, and the fold, which takes one row at a time, the rest; it must be plain, without bias and softcap.
//   cooperative, 128 x 256: both warp groups share a tile, 128 registers each, and nothing hides the fold; but the bytes loaded
//   per product are the fewest. For large H, and for whatever is not plain.
//
// Clusters of two tiles in a column share the loads of the weight. Hidden and the weight have adjacent columns, so both operands
// are K-major. Tiles are independent of each other and each is summed in one order: equal input gives equal bits.
#include "core/common.h"
#include "logprobs/hopper_forward.h"

#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/version.h>

#include "logprobs/tile_fold.cuh"

namespace prefkern {
namespace {

using namespace cute;

// What CUTLASS' warp-specialised kernels ask of an epilogue without shared memory or loads.
template <bool PLAIN> class FoldTile {
 public:
  using ElementC = float;
  using ElementD = float;
  using StrideC = Stride<int64_t, _1, int64_t>;
  using StrideD = StrideC;
  struct SharedStorage {};
  struct Arguments {
    TileFoldArgs tiles;
  };
  using Params = Arguments;

  template <class Shape> static Params to_underlying_arguments(const Shape&, const Arguments& args, void*) { return args; }
  template <class Shape> static size_t get_workspace_size(const Shape&, const Arguments&) { return 0; }
  template <class Shape> static bool can_implement(const Shape&, const Arguments&) { return true; }

  CUTLASS_HOST_DEVICE explicit FoldTile(const Params& params) : params_(params) {}

  template <class Problem, class Block, class Coord, class Engine, class Layout, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(Problem, Block block, Coord coord, const Tensor<Engine, Layout>& accumulators, Mma mma,
                                 Residue, int thread, char*) {
    constexpr int columns = size<1>(Block{}), count = columns / kQuad;
    constexpr int row_groups = size<1>(Layout{});
    // A lane's accumulators: (adjacent columns, rows 8 apart, steps of 8 columns) x groups of 64 rows.
    static_assert(is_same_v<decltype(shape<0>(Layout{})), Shape<_2, _2, Int<columns / 8>>> && size<2>(Layout{}) == 1);
    const auto [tile_m, tile_n, tile_k, tile_l] = coord;
    const auto rows = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(block)));
#pragma unroll
    for (int group = 0; group < row_groups; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float logits[count];
#pragma unroll
        for (int i = 0; i < count; i++) logits[i] = accumulators(make_coord(i % 2, half, i / 2), group, 0);
        const int64_t row = int64_t(tile_m) * size<0>(Block{}) + get<0>(rows(make_coord(0, half, 0), group, 0));
        fold_tile_row<PLAIN>(params_.tiles, row, tile_n, thread % kWarp, logits);
      }
  }

 private:
  Params params_;
};

template <class T, class Schedule, class Tile, bool PLAIN> struct Head {
  using Cluster = Shape<_2, _1, _1>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<FoldTile<PLAIN>>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, cutlass::layout::RowMajor, 8, T, cutlass::layout::ColumnMajor, 8,
      float, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::TensorStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;

  static int launch(const HopperHeadArgs& a, cudaStream_t stream) {
    const LogitBlock<float>& b = a.tiles.block;
    typename Kernel::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {int(b.rows), int(b.cols), int(a.width), 1};
    args.mainloop.ptr_A = static_cast<const T*>(a.hidden);
    args.mainloop.dA = {a.hidden_stride, _1{}, int64_t(0)};
    args.mainloop.ptr_B = static_cast<const T*>(a.weight);
    args.mainloop.dB = {a.weight_stride, _1{}, int64_t(0)};
    args.epilogue.tiles = a.tiles;
    int device = 0, multiprocessors = 0;
    if (const auto error = cudaGetDevice(&device)) return error;
    if (const auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
    args.hw_info.device_id = device;
    args.hw_info.sm_count = multiprocessors;
    // Tiles that run together then lie in a block of the product, rather than along one side of it, and share what L2 holds.
    args.scheduler.max_swizzle_size = 8;
    if (!Kernel::can_implement(args)) return cudaErrorInvalidValue;

    const auto kernel = &cutlass::device_kernel<Kernel>;
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize))
      return error;
    const typename Kernel::Params params = Kernel::to_underlying_arguments(args, nullptr);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = size<0>(Cluster{});
    cluster.val.clusterDim.y = size<1>(Cluster{});
    cluster.val.clusterDim.z = size<2>(Cluster{});
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
  }
};

// Bias and softcap need registers that a ping-pong tile does not leave.
bool is_small(int64_t width, bool plain) { return plain && width <= 2048; }
constexpr int kSmallColumns = 192, kLargeColumns = 256;
template <class T>
using SmallHead = Head<T, cutlass::gemm::KernelTmaWarpSpecializedPingpong, Shape<_128, Int<kSmallColumns>, _64>, true>;
template <class T>
using LargeHead = Head<T, cutlass::gemm::KernelTmaWarpSpecializedCooperative, Shape<_128, Int<kLargeColumns>, _64>, false>;

template <class T> int launch(const HopperHeadArgs& a, cudaStream_t stream) {
  return is_small(a.width, is_plain(a.tiles.block.transform)) ? SmallHead<T>::launch(a, stream)
                                                              : LargeHead<T>::launch(a, stream);
}

}  // namespace

#define PK_TEXT_(x) #x
#define PK_TEXT(x) PK_TEXT_(x)
const char* cutlass_version() { return PK_TEXT(CUTLASS_MAJOR) "." PK_TEXT(CUTLASS_MINOR) "." PK_TEXT(CUTLASS_PATCH); }

bool hopper_device() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 && minor == 0;
}

int64_t hopper_tile_columns(int64_t width, bool plain) { return is_small(width, plain) ? kSmallColumns : kLargeColumns; }

int cuda_hopper_head(const HopperHeadArgs& a, void* stream) {
  if (a.tiles.block.rows == 0 || a.tiles.block.cols == 0) return 0;
  if (!hopper_head_takes(a)) return static_cast<int>(cudaErrorInvalidValue);
  const auto s = static_cast<cudaStream_t>(stream);
  return a.tiles.block.dtype == DType::bf16 ? launch<cutlass::bfloat16_t>(a, s) : launch<cutlass::half_t>(a, s);
}

}  // namespace prefkern
