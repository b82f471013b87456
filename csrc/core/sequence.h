// Where the tokens of each sequence lie: padded [B, T], or packed [N] with cu_seqlens. Every token op takes both.
#pragma once
#include "core/common.h"

namespace prefkern {

struct SequenceLayout {
  int64_t sequences = 0;
  int64_t padded_length = 0;            // T; unused when packed
  int64_t tokens = 0;                   // B * T, or N
  const int32_t* cu_seqlens = nullptr;  // [B + 1] when packed, null when padded
};

inline namespace PK_ISA {

PK_HD int64_t sequence_begin(const SequenceLayout& l, int64_t b) {
  return l.cu_seqlens ? int64_t(l.cu_seqlens[b]) : b * l.padded_length;
}
PK_HD int64_t sequence_end(const SequenceLayout& l, int64_t b) { return sequence_begin(l, b + 1); }

// On CUDA cu_seqlens is not looked at before the launch. What may be read is a range inside [0, tokens); and unless the
// first sequence begins at 0 and the last one ends at N, some tokens belong to none.
PK_HD bool sequence_valid(const SequenceLayout& l, int64_t b) {
  const int64_t begin = sequence_begin(l, b), end = sequence_end(l, b);
  return begin >= 0 && begin <= end && end <= l.tokens && (b > 0 || begin == 0) && (b + 1 < l.sequences || end == l.tokens);
}

}  // namespace PK_ISA
}  // namespace prefkern
