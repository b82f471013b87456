// The CPU walk of runs.h: 64 tokens of a pair of rows are compared at once and leave one bit each. A row's bits from all
// rows of the other sign are joined, and its run goes on while they are ones. A group ends when no row runs on, mostly
// within the first 64 tokens; a pair is left out where both rows have stopped or have all their bits, so that rows that
// all agree cost one comparison each, not one per pair.
#include "conflicts/runs_cpu.h"

#include "core/mask.h"
#include "core/simd_ids.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kStep = 64;

PK_HD uint64_t first_bits(int64_t n) { return n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

// How many of a row's next 64 tokens there are; 0 or less past its end.
template <class T> PK_HD int64_t ahead(const ConflictRow<T>& row, int64_t at) {
  return row.length - at < kStep ? row.length - at : kStep;
}

// Bit k is token at + k; backwards bit 63 is the token that is `at` before the last, bit 62 the one before it.
template <bool BACKWARD, class T> PK_HD uint64_t compare(const ConflictRow<T>& a, const ConflictRow<T>& b, int64_t at,
                                                         int64_t n) {
  if (!BACKWARD) return equal_bits(a.tokens + at, b.tokens + at, n);
  return equal_bits(a.tokens + a.length - at - n, b.tokens + b.length - at - n, n) << (kStep - n);
}
template <bool BACKWARD> PK_HD bool covers(uint64_t bits, int64_t n) {
  const uint64_t wanted = BACKWARD ? first_bits(n) << (kStep - n) : first_bits(n);
  return (bits & wanted) == wanted;
}
template <bool BACKWARD> PK_HD int64_t leading_ones(uint64_t bits) {
  if (bits == ~uint64_t(0)) return kStep;
  return BACKWARD ? __builtin_clzll(~bits) : __builtin_ctzll(~bits);
}

template <bool BACKWARD, class T> void runs_one_way(ConflictRow<T>* rows, int64_t positives, int64_t count) {
  for (int64_t k = 0; k < count; k++) rows[k].run = 0;
  for (int64_t at = 0;; at += kStep) {
    for (int64_t k = 0; k < count; k++) rows[k].agreed = 0;
    for (int64_t i = 0; i < positives; i++) {
      ConflictRow<T>& p = rows[i];
      const int64_t p_ahead = ahead(p, at);
      if (p_ahead <= 0) continue;
      bool p_waits = p.run == at;  // for bits that it does not have yet
      for (int64_t j = positives; j < count; j++) {
        ConflictRow<T>& q = rows[j];
        const int64_t q_ahead = ahead(q, at), n = p_ahead < q_ahead ? p_ahead : q_ahead;
        if (n <= 0) continue;
        const bool q_waits = q.run == at && !covers<BACKWARD>(q.agreed, n);
        if (!p_waits && !q_waits) continue;
        const uint64_t bits = compare<BACKWARD>(p, q, at, n);
        p.agreed |= bits;
        q.agreed |= bits;
        p_waits = p_waits && !covers<BACKWARD>(p.agreed, p_ahead);
      }
    }
    bool go_on = false;
    for (int64_t k = 0; k < count; k++) {
      if (rows[k].run != at) continue;
      rows[k].run += leading_ones<BACKWARD>(rows[k].agreed);
      go_on |= rows[k].run == at + kStep;
    }
    if (!go_on) return;
  }
}

template <class T> void runs(ConflictRow<T>* rows, int64_t positives, int64_t count, bool backward) {
  backward ? runs_one_way<true>(rows, positives, count) : runs_one_way<false>(rows, positives, count);
}

void lengths(const SequenceLayout& layout, const uint8_t* mask, int64_t* length, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++) {
    const int64_t first = sequence_begin(layout, b), n = sequence_end(layout, b) - first;
    length[b] = n;
    if (!mask) continue;
    const int64_t kept = count_tokens(mask + first, n);
    length[b] = count_tokens(mask + first, kept) == kept ? kept : -1;
  }
}

template <class S> void weights(const ConflictWeightArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b++) {
    const int64_t first = sequence_begin(a.layout, b), n = sequence_end(a.layout, b) - first;
    const RowWeights<S> row = row_weights(a.rule, a.advantages[b], a.forward[b], a.backward[b], a.length[b]);
    S* out = a.weights + first;
    for (int64_t t = 0; t < n; t++) out[t] = conflict_weight(row, t);
  }
}

}  // namespace

extern const RunsCpu runs_cpu;
const RunsCpu runs_cpu = {&lengths, &runs<int32_t>, &runs<int64_t>, &weights<float>, &weights<double>};

}  // namespace PK_ISA
}  // namespace prefkern
