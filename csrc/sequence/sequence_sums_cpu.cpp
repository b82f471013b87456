// The CPU walk of sequence_sums.h: one sequence after the other, a vector of tokens at a time.
//
// The mask of a sequence is counted first: sequences without tokens are skipped, those without padding need no mask, and
// the mean knows its divisor. Sums stay in registers for a tile and are then added in double. Where places matter, the
// weights of a tile's tokens are written down first, and what follows is as with given weights.
#include "sequence/sequence_sums_cpu.h"

#include "core/mask.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kTile = 1024;

// The arrays of a sequence. mask is null where all its tokens count.
template <class S> struct Tokens {
  const S *values, *minus, *weights;
  const uint8_t* mask;
};

template <class T> PK_HD T* from(T* p, int64_t i) { return p ? p + i : nullptr; }

template <class V, class S> PK_HD V difference(const Tokens<S>& at, int64_t i) {
  const V x = Mem<V>::load(at.values + i);
  return at.minus ? x - Mem<V>::load(at.minus + i) : x;
}

// w f(x - y) of a vector of tokens.
template <TokenTransform F> struct Terms {
  template <class V, class S> static PK_HD V of(const Tokens<S>& at, int64_t i) {
    const V f = token_value<F>(difference<V>(at, i));
    return at.weights ? f * Mem<V>::load(at.weights + i) : f;
  }
};
template <TokenTransform F> struct Slopes {
  template <class V, class S> static PK_HD V of(const Tokens<S>& at, int64_t i) {
    const V f = F == TokenTransform::none ? splat<V>(1) : token_slope<F>(difference<V>(at, i));
    return at.weights ? f * Mem<V>::load(at.weights + i) : f;
  }
};

// Calls use(i, value, lanes) for each vector of tokens of which some count; others are 0 in it. skip(i, lanes) where none
// does. The last lanes < L of a sequence go through a vector that is filled up with tokens that do not count.
template <class What, class V, class S, class Use, class Skip>
PK_HD void for_tokens(const Tokens<S>& at, int64_t begin, int64_t end, Use&& use, Skip&& skip) {
  constexpr int64_t L = Lanes<V>::count;
  const V zero = {};
  int64_t i = begin;
  for (; i + L <= end; i += L) {
    const Cover c = at.mask ? cover<int(L)>(at.mask + i) : Cover::all;
    if (c == Cover::none) {
      skip(i, L);
      continue;
    }
    const V v = What::template of<V>(at, i);
    use(i, c == Cover::all ? v : Keep<V>::load(at.mask + i) ? v : zero, L);
  }
  if (i == end) return;
  S values[L] = {}, minus[L] = {}, weights[L] = {};
  uint8_t mask[L] = {};
  for (int64_t k = 0; k < L && i + k < end; k++) {
    values[k] = at.values[i + k];
    if (at.minus) minus[k] = at.minus[i + k];
    if (at.weights) weights[k] = at.weights[i + k];
    mask[k] = at.mask ? at.mask[i + k] : 1;
  }
  const V v = What::template of<V>(Tokens<S>{values, at.minus ? minus : nullptr, at.weights ? weights : nullptr, mask}, 0);
  use(i, Keep<V>::load(mask) ? v : zero, end - i);
}

template <class S> struct Sequence {
  int64_t begin, size, tokens, head;
  Tokens<S> at;

  Sequence(const SequenceSumArgs<S>& a, int64_t b) {
    const TokenSpan span = token_span(a, b);
    begin = span.begin;
    size = span.end - begin;
    head = span.head;
    const uint8_t* mask = from(a.mask, begin);
    tokens = mask ? count_tokens(mask, size) : size;
    at = {a.values + begin, from(a.minus, begin), from(a.weights, begin), tokens == size ? nullptr : mask};
  }
};

// The tokens of a sequence with the weights of their places, a tile at a time.
template <class S> struct PlacedTile {
  S weights[kTile];
  int64_t place = 0;

  Tokens<S> next(const Sequence<S>& s, const PlaceRule& rule, int64_t first, int64_t n) {
    double power = decay_power(rule.decay, place);
    for (int64_t k = 0; k < n; k++) {
      weights[k] = 0;
      if (s.at.mask && !s.at.mask[first + k]) continue;
      const double weight = place_weight(rule, place++, s.head, power);
      weights[k] = S(s.at.weights ? double(s.at.weights[first + k]) * weight : weight);
      power *= rule.decay;
    }
    return {s.at.values + first, from(s.at.minus, first), weights, from(s.at.mask, first)};
  }
};

// Calls use(first token of the tile, its tokens, how many).
template <class S, class Use> PK_HD void for_tiles(const SequenceSumArgs<S>& a, const Sequence<S>& s, Use&& use) {
  PlacedTile<S> placed;
  const bool places = places_matter(a);
  for (int64_t i = 0; i < s.size; i += kTile) {
    const int64_t n = i + kTile < s.size ? kTile : s.size - i;
    if (places) use(i, placed.next(s, a.place, i, n), n);
    else use(i, Tokens<S>{s.at.values + i, from(s.at.minus, i), from(s.at.weights, i), from(s.at.mask, i)}, n);
  }
}

template <TokenTransform F, class V>
void forward(const SequenceSumArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  static_assert(kTile % Lanes<V>::count == 0, "only the last tile may have a rest");
  for (int64_t b = begin; b < end; b++) {
    const Sequence<S> s(a, b);
    double sum = 0;
    if (s.tokens > 0)
      for_tiles(a, s, [&](int64_t, const Tokens<S>& at, int64_t n) {
        V tile = {};
        for_tokens<Terms<F>, V>(at, 0, n, [&](int64_t, V v, int64_t) { tile += v; }, [](int64_t, int64_t) {});
        sum += lane_sum(tile);
      });
    a.sums[b] = S(sum * sequence_scale(a.mean, s.tokens));
  }
}

template <TokenTransform F, class V>
void backward(const SequenceSumArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  for (int64_t b = begin; b < end; b++) {
    const Sequence<S> s(a, b);
    const int64_t row = sequence_begin(a.layout, b), row_end = sequence_end(a.layout, b), end = s.begin + s.size;
    if (s.tokens == 0) {
      __builtin_memset(a.grad + row, 0, (row_end - row) * sizeof(S));
      continue;
    }
    __builtin_memset(a.grad + row, 0, (s.begin - row) * sizeof(S));
    __builtin_memset(a.grad + end, 0, (row_end - end) * sizeof(S));
    const S g = S(double(a.upstream[b]) * sequence_scale(a.mean, s.tokens));
    for_tiles(a, s, [&](int64_t first, const Tokens<S>& at, int64_t n) {
      S* grad = a.grad + s.begin + first;
      for_tokens<Slopes<F>, V>(
          at, 0, n,
          [&](int64_t i, V slope, int64_t lanes) {
            const V out = slope == S(0) ? V{} : slope * g;  // what is masked stays 0 whatever comes from upstream
            if (lanes == L) return Mem<V>::store(grad + i, out);
            S rest[L];
            Mem<V>::store(rest, out);
            for (int64_t k = 0; k < lanes; k++) grad[i + k] = rest[k];
          },
          [&](int64_t i, int64_t lanes) { __builtin_memset(grad + i, 0, lanes * sizeof(S)); });
    });
  }
}

template <class V> void forward_any(const SequenceSumArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  if (a.transform == TokenTransform::exp) forward<TokenTransform::exp, V>(a, begin, end);
  else forward<TokenTransform::none, V>(a, begin, end);
}
template <class V> void backward_any(const SequenceSumArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  if (a.transform == TokenTransform::exp) backward<TokenTransform::exp, V>(a, begin, end);
  else backward<TokenTransform::none, V>(a, begin, end);
}

}  // namespace

extern const SequenceSumsCpu sequence_sums_cpu;
const SequenceSumsCpu sequence_sums_cpu = {&forward_any<VecF>, &forward_any<double>, &backward_any<VecF>,
                                           &backward_any<double>};

}  // namespace PK_ISA
}  // namespace prefkern
