#include "logprobs/hopper_walk.h"

#include "logprobs/cuda_forward.h"
#include "logprobs/hopper_forward.h"

namespace prefkern {
namespace {

constexpr int64_t kRowMultiple = 256;  // a cluster's rows

HopperHeadArgs head_args(const Head& h, int64_t r, int64_t rows) {
  HopperHeadArgs a;
  a.tiles.block = block_of<float>(h, 0, h.vocab, r, rows);
  a.tiles.block.dtype = h.dtype;
  a.width = h.width;
  a.hidden_stride = row_stride(h.hidden);
  a.weight_stride = row_stride(h.weight);
  a.hidden = static_cast<const char*>(h.hidden.const_data_ptr()) + r * a.hidden_stride * element_size(h.dtype);
  a.weight = h.weight.const_data_ptr();
  return a;
}

}  // namespace

bool hopper_head_takes(const HopperHeadArgs& a) {
  constexpr int64_t together = 8, limit = int64_t(1) << 31;  // elements in 16 bytes; sizes reach the kernel as int
  const DType type = a.tiles.block.dtype;
  const auto aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % together == 0;
  };
  return (type == DType::bf16 || type == DType::f16) && a.width > 0 && a.width % together == 0 &&
         aligned(a.hidden, a.hidden_stride) && aligned(a.weight, a.weight_stride) && a.tiles.block.rows < limit &&
         a.tiles.block.cols < limit && a.width < limit;
}

bool takes_hopper(const Head& h, int64_t outputs) {
  const CudaForward path = cuda_forward();
  if (!h.cuda || path == CudaForward::stage1 || h.lora || h.rounded || h.keep) return false;
  if (outputs & (kSumSqProbs | kMeanLogit | kIsTop1)) return false;
  if (path == CudaForward::automatic && !stage2_measured_ahead(h.rows, h.width, h.vocab)) return false;
  return hopper_head_compiled() && hopper_head_takes(head_args(h, 0, h.rows)) && hopper_device();
}

void hopper_walk(const Head& h, int64_t outputs, const HeadOutputs* out, const OptTensor& state) {
  FoldArgs<float> f;
  out ? set_outputs(f, *out, outputs, h.rows) : set_sums(f, outputs);
  // The parts stay within what the other path would take for its logits; rows are independent of how they are cut.
  const bool plain = is_plain(block_of<float>(h, 0, h.vocab, 0, h.rows).transform);
  const int64_t tiles = ceil_div(h.vocab, hopper_tile_columns(h.width, plain)), arrays = tiles * kTileParts;
  const int64_t fit = h.plan.workspace_bytes / (arrays * int64_t(sizeof(float))) / kRowMultiple * kRowMultiple;
  const int64_t chunk = std::min(h.rows, std::max(fit, kRowMultiple));
  Tensor parts = empty({arrays, chunk}, ScalarType::Float, h.hidden), target_pre = empty({chunk}, ScalarType::Float, h.hidden);
  for (int64_t r = 0; r < h.rows; r += chunk) {
    HopperHeadArgs a = head_args(h, r, std::min(chunk, h.rows - r));
    a.tiles.parts = mutable_data<float>(parts);
    a.tiles.target_pre = mutable_data<float>(target_pre);
    check_cuda(cuda_hopper_head(a, h.stream));
    TileMergeArgs merge{a.tiles, tiles, f};
    FoldArgs<float>& rows = merge.rows;
    rows.last = out != nullptr;
    rows.state = state ? mutable_data<float>(*state) + r : nullptr;
    rows.state_stride = h.rows;
    for (float** p : {&rows.logp, &rows.out_entropy, &rows.lse, &rows.row_max, &rows.row_log2_sum}) advance(*p, r);
    check_cuda(cuda_merge_tiles(merge, h.stream));
  }
}

}  // namespace prefkern
