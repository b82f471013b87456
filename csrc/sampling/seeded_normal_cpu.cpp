// The CPU walk of seeded_normal.h: a tile of as many blocks of four as there are lanes at a time, for which all rows are added up
// in registers. A tile of which only a part is wanted is computed as a whole, by the same instructions: an element has the same
// bits wherever a range begins or ends.
#include "sampling/seeded_normal_cpu.h"

#include "math/normal.h"
#include "core/philox_lanes.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int kTile = 4 * kLanes;

template <class T, bool adds> void combine(const NormalArgs<float>& a, int64_t begin, int64_t end) {
  const uint64_t first = uint64_t(a.first_element) + uint64_t(begin), last = uint64_t(a.first_element) + uint64_t(end);
  const T* add_to = static_cast<const T*>(a.add_to);
  T* out = static_cast<T*>(a.out);
  for (uint64_t block = first / 4; 4 * block < last; block += kLanes) {
    const TileBlocks blocks = tile_blocks(block);
    VecF sum[4] = {};
    for (int64_t i = 0; i < a.rows; i++) {
      const PhiloxLanes w = philox_blocks(a.seed, blocks.even, blocks.odd, uint32_t(a.first_row + i));
      const NormalPair<VecF> p = normal_pair<VecF>(w.word[0], w.word[1]), q = normal_pair<VecF>(w.word[2], w.word[3]);
      const float weight = a.weights ? a.weights[i] : 1.0f;
      sum[0] += p.first * weight;
      sum[1] += p.second * weight;
      sum[2] += q.first * weight;
      sum[3] += q.second * weight;
    }
    in_order(sum);
    const int64_t at = int64_t(4 * block) - a.first_element;
    const int64_t skip = at < begin ? begin - at : 0, stop = at + kTile > end ? end - at : int64_t(kTile);
    const bool whole = skip == 0 && stop == kTile;
    T before[kTile] = {}, after[kTile];
    if (adds && !whole)
      for (int64_t j = skip; j < stop; j++) before[j] = add_to[at + j];
    const T* from = adds && whole ? add_to + at : before;
    T* to = whole ? out + at : after;
    for (int k = 0; k < 4; k++) {
      VecF v = sum[k] * a.scale;
      if (adds) v = Mem<VecF>::load(from + k * kLanes) + sum[k] * a.scale;
      Mem<VecF>::store(to + k * kLanes, v);
    }
    if (!whole)
      for (int64_t j = skip; j < stop; j++) out[at + j] = after[j];
  }
}

template <class T> void combine_as(const NormalArgs<float>& a, int64_t begin, int64_t end) {
  a.add_to ? combine<T, true>(a, begin, end) : combine<T, false>(a, begin, end);
}

void normal_f32(const NormalArgs<float>& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32: return combine_as<float>(a, begin, end);
    case DType::bf16: return combine_as<bf16_t>(a, begin, end);
    case DType::f16: return combine_as<f16_t>(a, begin, end);
    case DType::f64: return;
  }
}

void normal_f64(const NormalArgs<double>& a, int64_t begin, int64_t end) {
  const double* add_to = static_cast<const double*>(a.add_to);
  double* out = static_cast<double*>(a.out);
  const uint64_t first = uint64_t(a.first_element) + uint64_t(begin), last = uint64_t(a.first_element) + uint64_t(end);
  for (uint64_t block = first / 4; 4 * block < last; block++) {
    double sum[4] = {};
    for (int64_t i = 0; i < a.rows; i++) {
      const PhiloxWords w = philox(a.seed, uint32_t(block), uint32_t(block >> 32), uint32_t(a.first_row + i), 0);
      const NormalPair<double> p = normal_pair64(w.word[0], w.word[1]), q = normal_pair64(w.word[2], w.word[3]);
      const double weight = a.weights ? a.weights[i] : 1.0;
      sum[0] += p.first * weight;
      sum[1] += p.second * weight;
      sum[2] += q.first * weight;
      sum[3] += q.second * weight;
    }
    for (int64_t k = 0; k < 4; k++) {
      const int64_t j = int64_t(4 * block) + k - a.first_element;
      if (j >= begin && j < end) out[j] = (add_to ? add_to[j] : 0.0) + sum[k] * a.scale;
    }
  }
}

void words(const PhiloxArgs& a, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kLanes) {
    const TileBlocks blocks = tile_blocks(uint64_t(a.first_block + first));
    const PhiloxLanes w = philox_blocks(a.seed, blocks.even, blocks.odd, uint32_t(a.row));
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t at = first + block_of_lane(lane);
      for (int j = 0; j < 4 && at < end; j++) a.words[4 * at + j] = w.word[j][lane];
    }
  }
}

}  // namespace

extern const SeededNormalCpu seeded_normal_cpu;
const SeededNormalCpu seeded_normal_cpu = {&normal_f32, &normal_f64, &words};

}  // namespace PK_ISA
}  // namespace prefkern
