// The vocabulary is cut into spans, whose number depends on its size alone; a thread folds the columns of a span one slice after
// the other, and the spans' states are joined in order. So results depend neither on threads nor on how rows are shared out.
#include "logprobs/fused_forward.h"

#include "core/gemm_cpu.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "logprobs/fused_forward_cpu.h"
#include "logprobs/logits_fold_cpu.h"
#include "logprobs/shard_merge.h"

namespace prefkern {

PK_ISA_TABLE(LogitsFoldCpu, logits_fold_cpu)
PK_ISA_TABLE(FusedForwardCpu, fused_forward_cpu)

namespace {

// Rows are cut further where there are more threads than spans, or few more spans than threads.
int64_t row_parts(int64_t spans, int64_t rows, int64_t threads) {
  const int64_t most = std::max<int64_t>(1, rows / 64);
  int64_t parts = 1;
  while (parts < most && ceil_div(spans * parts, threads) * threads * 10 > spans * parts * 11) parts++;
  return parts;
}

// What a thread folds after each block of rows of its slice.
struct Slice {
  LaneFoldArgs args;
  bool by_lane;
  static void done(void* context, int64_t row, int64_t rows, int64_t, int64_t) {
    const Slice& s = *static_cast<const Slice*>(context);
    s.by_lane ? fused_forward_cpu().fold(s.args, row, row + rows) : logits_fold_cpu().fold_f32(s.args.fold, row, row + rows);
  }
};

class Forward {
 public:
  Forward(const Head& h, int64_t outputs, const HeadOutputs* out)
      : h_(h), cpu_(gemm_of_isa()), spans_(fused_spans(h.vocab)), slice_(h.plan.vocab_block), stride_(fused_stride(slice_)) {
    out ? set_outputs(fold_, *out, outputs, h.rows) : set_sums(fold_, outputs);
    threads_ = num_threads();
    by_lane_ = !fold_.extra && !h.bias && h.options.softcap == 0;
    workspace_ = cpu_.workspace(h.plan.row_chunk, slice_, h.width);
    logits_ = h.plan.row_chunk * stride_;
    lanes_ = by_lane_ ? std::min(kFusedStateRows, h.rows) * fused_forward_cpu().lane_state : 0;
    per_thread_ = workspace_ + logits_ + lanes_;
    space_ = empty({threads_ * per_thread_ + kAlignment}, ScalarType::Float, h.hidden);
    states_ = empty({spans_.count, kRowStateArrays, std::min(kFusedStateRows, h.rows)}, ScalarType::Float, h.hidden);
  }

  // Rows [first, first + rows), of which there are at most kFusedStateRows, into the states of all spans.
  void fold(int64_t first, int64_t rows) const {
    const int64_t parts = row_parts(spans_.count, rows, threads_), per_part = ceil_div(rows, parts);
    const int64_t tasks = spans_.count * parts;
    float* space = aligned(mutable_data<float>(space_));
    parallel_for(0, threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; thread++)
        for (int64_t task = thread; task < tasks; task += threads_) {
          const int64_t row = task / spans_.count * per_part;
          fold_span(task % spans_.count, first, row, std::min(per_part, rows - row), space + thread * per_thread_);
        }
    });
  }

  FoldArgs<float> joinable(int64_t first, int64_t rows) const {
    FoldArgs<float> f = fold_;
    f.block = block_of<float>(h_, 0, h_.vocab, first, rows);
    f.state = mutable_data<float>(states_);
    f.state_stride = states_.size(2);
    return f;
  }
  int64_t spans() const { return spans_.count; }
  int64_t span_stride() const { return kRowStateArrays * states_.size(2); }

 private:
  void fold_span(int64_t span, int64_t first, int64_t begin, int64_t count, float* space) const {
    const FusedForwardCpu& lanes = fused_forward_cpu();
    const int64_t left = span * spans_.cols, right = std::min(h_.vocab, left + spans_.cols);
    const int64_t chunks = ceil_div(count, h_.plan.row_chunk), rows = ceil_div(count, chunks);
    for (int64_t col = left; col < right; col += slice_)
      for (int64_t row = begin; row < begin + count; row += rows) {
        const int64_t n = std::min(rows, begin + count - row), cols = std::min(slice_, right - col);
        Slice slice{{joinable(first + row, n)}, by_lane_};
        FoldArgs<float>& f = slice.args.fold;
        f.block.cols = cols;
        f.block.first_col += col;
        if (f.block.transform.bias) f.block.transform.bias += col;
        f.logits = space + workspace_;
        f.logits_map = {1, stride_, 0};
        f.first = col == left;
        f.last = false;
        f.state += span * span_stride() + row;
        slice.args.lanes = space + workspace_ + logits_ + (row - begin) * lanes.lane_state;
        if (by_lane_ && col == left) lanes.begin(slice.args, 0, n);
        GemmArgs g{n,
                   cols,
                   h_.width,
                   at(h_.hidden, first + row),
                   at(h_.weight, col),
                   row_stride(h_.hidden),
                   row_stride(h_.weight),
                   false,
                   true,
                   h_.dtype,
                   h_.dtype};
        g.c = space + workspace_;
        g.c_stride = stride_;
        g.pairs = cpu_.pairs && h_.dtype == DType::bf16;
        g.workspace = space;
        g.done = &Slice::done;
        g.context = &slice;
        cpu_.multiply(g);
        if (by_lane_ && col + cols == right) lanes.end(slice.args, 0, n);
      }
  }
  const void* at(const Tensor& matrix, int64_t row) const {
    return static_cast<const char*>(matrix.const_data_ptr()) + row * row_stride(matrix) * element_size(h_.dtype);
  }

  const Head& h_;
  const GemmCpu& cpu_;
  FoldArgs<float> fold_;
  FusedSpans spans_;
  int64_t slice_, stride_;
  bool by_lane_;
  int64_t threads_, workspace_, logits_, lanes_, per_thread_;
  Tensor space_, states_;
};

}  // namespace

bool can_fuse_forward(const Head& h) {
  return !h.cuda && h.acc == DType::f32 && own_gemm() && !h.keep && !h.rounded && !h.lora;
}

void fused_forward(const Head& h, int64_t outputs, const HeadOutputs* out, const OptTensor& state) {
  const Forward forward(h, outputs, out);
  for (int64_t first = 0; first < h.rows; first += kFusedStateRows) {
    const int64_t rows = std::min(kFusedStateRows, h.rows - first);
    forward.fold(first, rows);
    FoldArgs<float> f = forward.joinable(first, rows);
    if (out) {
      for (float** p : {&f.logp, &f.out_entropy, &f.lse, &f.sum_sq_probs, &f.mean_logit, &f.row_max, &f.row_log2_sum})
        advance(*p, first);
      advance(f.is_top1, first);
      cpu_merge_shards({f, forward.spans(), forward.span_stride()});
      continue;
    }
    FoldArgs<float> joined = f;
    joined.state = mutable_data<float>(*state) + first;
    joined.state_stride = h.rows;
    for (int64_t row = 0; row < rows; row++) {
      const float base2_factor = logit_factor(f.block.transform, row) * float(kLog2E);
      SoftmaxRow<float> r = load_state(f, row);
      for (int64_t i = 1; i < forward.spans(); i++)
        r = softmax_join(r, load_state(f, row + i * forward.span_stride()), base2_factor);
      store_state(joined, row, r);
    }
  }
}

}  // namespace prefkern
