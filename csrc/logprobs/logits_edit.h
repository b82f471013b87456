// What is done to a block of raw logits before it is folded, while it is in cache: rounding to a narrower type, as a sampler
// does whose head writes that type; and -inf for the tokens that a row does not keep, as a sampler does that draws from a part
// of the vocabulary.
//
// The blocks are contiguous [rows, cols].
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {

// logits = to(logits + bias), once rounded to nearest even.
struct RoundArgs {
  float* logits = nullptr;
  int64_t rows = 0, cols = 0;
  const float* bias = nullptr;  // [cols] or null
  DType to = DType::bf16;       // or f16
};

// The tokens that each row keeps: ids[begin[row]] to before ids[end[row]], ascending, none twice. Whatever they hold, nothing
// outside [0, count) is read of ids.
struct KeptIds {
  const int64_t *begin = nullptr, *end = nullptr;
  const void* ids = nullptr;  // int64, or int32
  bool wide = true;           // int64
  int64_t count = 0;
};

template <class S> struct KeepArgs {
  LogitBlock<S> block;      // its transform is that of the fold that follows
  void* logits = nullptr;
  KeptIds kept;
  // The mean of z over the kept tokens, [rows], or null. Between blocks of the vocabulary, which come in order, it holds a sum.
  S* mean_logit = nullptr;
};

// out[row] = g[row] where the row keeps its target, else 0: a probability of 0 has no gradient. May be in place.
template <class S> struct KeptUpstreamArgs {
  int64_t rows = 0;
  const int64_t* targets = nullptr;
  KeptIds kept;
  const S* g = nullptr;
  S* out = nullptr;
};

inline namespace PK_ISA {

struct IdRange {
  int64_t begin, end;
};
PK_HD IdRange ids_of_row(const KeptIds& kept, int64_t row) {
  const auto inside = [&](int64_t i, int64_t low) { return i < low ? low : i > kept.count ? kept.count : i; };
  const int64_t begin = inside(kept.begin[row], 0);
  return {begin, inside(kept.end[row], begin)};
}

// The first place in the range whose id is not below `id`.
template <class I> PK_HD int64_t first_not_below(const I* ids, IdRange range, int64_t id) {
  while (range.begin < range.end) {
    const int64_t middle = range.begin + (range.end - range.begin) / 2;
    if (ids[middle] < id) range.begin = middle + 1;
    else range.end = middle;
  }
  return range.begin;
}

template <class I> PK_HD bool keeps(const KeptIds& kept, int64_t row, int64_t id) {
  const IdRange range = ids_of_row(kept, row);
  const I* ids = static_cast<const I*>(kept.ids);
  const int64_t at = first_not_below(ids, range, id);
  return at < range.end && ids[at] == id;
}

// With a softcap, -inf marks what is not kept; a kept logit of -inf, which becomes -softcap, must be told from it.
constexpr float kLowestBf16 = -0x1.fep127f, kLowestF16 = -65504.0f;
template <class S> PK_HD S kept_logit(const LogitTransform<S>& t, S x, S lowest) {
  return t.softcap != 0 && x == -__builtin_inff() ? lowest : x;
}

}  // namespace PK_ISA

PK_API void cpu_round_logits(const RoundArgs& args);
PK_API void cpu_keep_logits(const KeepArgs<float>& args);
PK_API void cpu_keep_logits(const KeepArgs<double>& args);
PK_API void cpu_kept_upstream(const KeptUpstreamArgs<float>& args);
PK_API void cpu_kept_upstream(const KeptUpstreamArgs<double>& args);
// Enqueue on `stream`; return a cudaError_t.
PK_API int cuda_round_logits(const RoundArgs& args, void* stream);
PK_API int cuda_keep_logits(const KeepArgs<float>& args, void* stream);
PK_API int cuda_kept_upstream(const KeptUpstreamArgs<float>& args, void* stream);

}  // namespace prefkern
