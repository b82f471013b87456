// The CPU walk of skew.h, a row or a list per lane (row_tile.h).
#include "lists/skew_cpu.h"

#include "lists/row_tile.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

enum Array : int { kLeft, kRight, kScales, kLeftGrad, kRightGrad, kScalesGrad };
enum MeansArray : int { kItem, kMean, kMeansScales, kInverse, kMeans, kCounts };

template <class V> PK_HD V sum_sq(const Tile<V>& t, int a, int64_t width) {
  V sum = {};
  for (int64_t d = 0; d < width; d++) sum += t.get(a, d) * t.get(a, d);
  return sum;
}

template <class V>
void rows(const SkewArgs<typename Lanes<V>::Scalar>& a, typename Lanes<V>::Scalar* scratch, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const V zero = {}, one = splat<V>(1);
  const int64_t width = a.width, blocks = width / 2;
  const Tile<V> t{width, width * L, scratch};
  const S inverse_tau = S(1 / a.rule.tau);
  for (int64_t first = begin; first < end; first += L) {
    const int64_t count = (first + L < end ? first + L : end) - first;
    t.load(kLeft, a.left + first * width, count, width, width);
    t.load(kRight, a.right + first * width, count, width, width);
    if (a.scales) t.load(kScales, a.scales + first * blocks, count, blocks, blocks);
    V margin = zero;
    if (a.margin) {
      t.load(kScalesGrad, a.margin + first, count, 1, 1);
      margin = t.get(kScalesGrad, 0);
    }
    const V left_sq = sum_sq(t, kLeft, width), right_sq = sum_sq(t, kRight, width);
    const V left = inverse_length<V, S>(a.rule.normalize, left_sq), right = inverse_length<V, S>(a.rule.normalize, right_sq);
    V score = zero;
    for (int64_t l = 0; l < blocks; l++) {
      const V block = skew_block(t.get(kLeft, 2 * l) * left, t.get(kLeft, 2 * l + 1) * left, t.get(kRight, 2 * l) * right,
                                 t.get(kRight, 2 * l + 1) * right);
      score += a.scales ? block * t.get(kScales, l) : block;
    }
    const Logistic<V> g = logistic((score - margin) * inverse_tau);
    const V slope = a.rule.with_loss ? -(g.p * inverse_tau) : one;
    double* to = a.out.sums + first * kRowSums;
    each_lane(a.rule.with_loss ? g.nll : score, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowLoss] = double(x); });
    each_lane(one, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowCounts] = double(x); });
    each_lane(g.q, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowFirst] = double(x); });
    each_lane(score > 0 ? one : zero, count, [&](int64_t lane, S x) { to[lane * kRowSums + kRowSecond] = double(x); });
    if (!a.left_grad && !a.right_grad && !a.scales_grad) continue;
    // Along itself a vector changes the score by the score; a length at its floor is a constant.
    const V left_along = has_length<V, S>(a.rule.normalize, left_sq) ? slope * score : zero;
    const V right_along = has_length<V, S>(a.rule.normalize, right_sq) ? slope * score : zero;
    for (int64_t l = 0; l < blocks; l++) {
      const V a0 = t.get(kLeft, 2 * l) * left, a1 = t.get(kLeft, 2 * l + 1) * left;
      const V b0 = t.get(kRight, 2 * l) * right, b1 = t.get(kRight, 2 * l + 1) * right;
      const V factor = a.scales ? slope * t.get(kScales, l) : slope;
      t.set(kLeftGrad, 2 * l, (factor * b1 - left_along * a0) * left);
      t.set(kLeftGrad, 2 * l + 1, (-factor * b0 - left_along * a1) * left);
      t.set(kRightGrad, 2 * l, (-factor * a1 - right_along * b0) * right);
      t.set(kRightGrad, 2 * l + 1, (factor * a0 - right_along * b1) * right);
      t.set(kScalesGrad, l, slope * skew_block(a0, a1, b0, b1));
    }
    if (a.left_grad) t.store(kLeftGrad, a.left_grad + first * width, count, width);
    if (a.right_grad) t.store(kRightGrad, a.right_grad + first * width, count, width);
    if (a.scales_grad) t.store(kScalesGrad, a.scales_grad + first * blocks, count, blocks);
  }
}

template <class V>
void means(const SkewMeansArgs<typename Lanes<V>::Scalar>& a, typename Lanes<V>::Scalar* scratch, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const V zero = {}, one = splat<V>(1);
  const int64_t width = a.width, blocks = width / 2, items = a.items, size = items * width;
  const Tile<V> t{items, (width > items ? width : items) * L, scratch};
  const S inverse_tau = S(1 / a.rule.tau);
  for (int64_t first = begin; first < end; first += L) {
    const int64_t count = (first + L < end ? first + L : end) - first;
    S* counts = t.array(kCounts);
    for (int64_t lane = 0; lane < L; lane++)
      for (int64_t i = 0; i < items; i++)
        counts[i * L + lane] = lane < count && (!a.mask || a.mask[(first + lane) * items + i]) ? 1 : 0;
    if (a.scales) t.load(kMeansScales, a.scales + first * blocks, count, blocks, blocks);
    for (int64_t d = 0; d < width; d++) t.set(kMean, d, zero);
    V total = zero;
    for (int64_t i = 0; i < items; i++) {
      t.load(kItem, a.embeddings + first * size + i * width, count, width, size);
      const V keep = t.get(kCounts, i), inverse = inverse_length<V, S>(a.rule.normalize, sum_sq(t, kItem, width));
      t.set(kInverse, i, inverse);
      for (int64_t d = 0; d < width; d++) t.set(kMean, d, t.get(kMean, d) + (keep > 0 ? t.get(kItem, d) * inverse : zero));
      total += keep;
    }
    const V share = one / (total > 0 ? total : one);
    for (int64_t i = 0; i < items; i++) {
      t.load(kItem, a.embeddings + first * size + i * width, count, width, size);
      const V inverse = t.get(kInverse, i);
      V score = zero;
      for (int64_t l = 0; l < blocks; l++) {
        const V block = skew_block(t.get(kItem, 2 * l) * inverse, t.get(kItem, 2 * l + 1) * inverse,
                                   t.get(kMean, 2 * l) * share, t.get(kMean, 2 * l + 1) * share);
        score += a.scales ? block * t.get(kMeansScales, l) : block;
      }
      t.set(kMeans, i, t.get(kCounts, i) > 0 ? score * inverse_tau : zero);
    }
    t.store(kMeans, a.means + first * items, count, items);
  }
}

}  // namespace

extern const SkewCpu skew_cpu;
const SkewCpu skew_cpu = {&rows<VecF>, &rows<double>, &means<VecF>, &means<double>};

}  // namespace PK_ISA
}  // namespace prefkern
