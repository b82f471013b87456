#include "logprobs/linear_call.h"

namespace prefkern {
namespace {

std::optional<KeptTokens> index_kept(const std::optional<KeptTokens>& keep, const Tensor& rows) {
  return keep ? std::optional(KeptTokens{index_rows(keep->begin, rows), index_rows(keep->end, rows), keep->ids}) : keep;
}

// A range without columns is checked as one of a single column.
void check_range(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const VocabRange& range) {
  const bool none = weight.dim() == 2 && weight.size(0) == 0;
  check_head(hidden, none ? zeros({1, weight.size(1)}, weight.scalar_type(), weight) : weight, none ? OptTensor() : bias);
  check_value(!none || !bias || (bias->dim() == 1 && bias->size(0) == 0), "bias has shape ",
              bias ? shape_text(*bias) : std::string(), "; expected [0]");
  check_value(range.vocab > 0, "vocab is ", range.vocab, "; a vocabulary needs at least one token");
  check_value(range.first_col >= 0 && range.first_col <= range.vocab - weight.size(0), "weight has ", weight.size(0),
              " rows from token ", range.first_col, " on, but the vocabulary has ", range.vocab);
}

}  // namespace

OptTensor of_kept_targets(const OptTensor& g, const std::optional<KeptTokens>& keep, const Tensor& targets) {
  if (!g || !keep) return g;
  const Tensor out = empty({g->size(0)}, g->scalar_type(), *g);
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    run_kept_upstream(
        KeptUpstreamArgs<S>{g->size(0), data<int64_t>(targets), keep->from_row(0), data<S>(*g), mutable_data<S>(out)},
        current_stream(*g), g->is_cuda());
  };
  g->scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return out;
}

Checked check(const HeadInputs& in) {
  in.range ? check_range(in.hidden, in.weight, in.bias, *in.range) : check_head(in.hidden, in.weight, in.bias);
  check_extras(in.hidden, in.weight, in.extras);
  check_value(in.chunk_bytes >= 0, "chunk_bytes is ", in.chunk_bytes, "; it must be positive, or None for the default");
  check_head_options(in.options);
  Checked c;
  c.rows = in.hidden.size(0);
  c.acc = accumulator(float_dtype(in.hidden, "hidden"));
  const int64_t columns = in.weight.size(0), vocab = in.range ? in.range->vocab : columns;
  const auto [targets, ignored] = checked_targets(in.targets, in.hidden, "hidden", c.rows, vocab, in.options.ignore_index);
  c.targets = targets;
  c.row_temperature = checked_row_temperature(in.row_temperature, in.hidden, "hidden", c.rows, c.acc);
  c.keep = checked_keep(in.extras, in.hidden, targets, vocab, in.options.ignore_index);
  c.nothing = ignored == c.rows || columns == 0;  // also N = 0
  if (ignored > 0 && !c.nothing) c.active = active_rows(targets, ignored, in.options.ignore_index);
  return c;
}

ChunkPlan plan_of(const Head& h, int64_t rows, int64_t chunk_bytes, bool backward) {
  // The columns of a block of lora_b are converted and added up as those of the weight are.
  const int64_t width = h.width + (h.lora ? h.lora->rank() : 0);
  // A forward that rounds takes the blocks of its backward. In others a GEMM may add up a logit in another order, and where that
  // crosses a rounding, the logits would differ by an ulp of the narrow type.
  return plan_chunks({rows, width, h.vocab, h.dtype, h.cuda, backward || h.rounded, chunk_bytes, element_size(h.logits)});
}

Head head_of(const HeadInputs& in, const Checked& c, const Tensor& hidden, bool backward) {
  Head h = c.active ? make_head(index_rows(hidden, *c.active), in.weight, index_rows(c.targets, *c.active), in.bias,
                                index_optional(c.row_temperature, *c.active), in.options, in.extras)
                    : make_head(hidden, in.weight, c.targets, in.bias, c.row_temperature, in.options, in.extras);
  h.keep = c.active ? index_kept(c.keep, *c.active) : c.keep;
  h.range = in.range;
  h.plan = plan_of(h, h.rows, in.chunk_bytes, backward);
  return h;
}

}  // namespace prefkern
