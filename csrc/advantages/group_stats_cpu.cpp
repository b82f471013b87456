// The CPU walk of group_stats.h.
//
// Ids in ascending order (what a trainer that repeats each prompt has) make every group a run of adjacent rewards. A run
// is loaded into vectors of double, summed, centred, squared and written without leaving the registers, and mostly its
// length is that of the run before, so that two comparisons find its end.
//
// Otherwise ids are numbered first, in order of appearance: by direct index where their range is small, by an
// open-addressing hash table where not. Three sweeps follow: sums, squared deviations, results.
#include "advantages/group_stats_cpu.h"

#include <cstdlib>
#include <new>

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

// ---- vectors of double ----------------------------------------------------------------------------------------------
constexpr int kWide = kLanes / 2;
typedef double VecD __attribute__((vector_size(kWide * 8)));

PK_HD VecD splat_wide(double x) { return x - VecD{}; }

// Loads and stores of the first n lanes, 0 < n <= kWide; lanes that are not loaded are 0.
#if defined(__AVX512F__)
PK_HD __mmask8 first_lanes(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
PK_HD VecD load_wide(const double* p, int64_t n) { return reinterpret_cast<VecD>(_mm512_maskz_loadu_pd(first_lanes(n), p)); }
PK_HD VecD load_wide(const float* p, int64_t n) {
  return reinterpret_cast<VecD>(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_lanes(n), p)));
}
PK_HD VecD keep_lanes(VecD v, int64_t n) {
  return reinterpret_cast<VecD>(_mm512_maskz_mov_pd(first_lanes(n), reinterpret_cast<__m512d>(v)));
}
PK_HD void store_wide(double* p, VecD v, int64_t n) { _mm512_mask_storeu_pd(p, first_lanes(n), reinterpret_cast<__m512d>(v)); }
PK_HD void store_wide(float* p, VecD v, int64_t n) {
  _mm256_mask_storeu_ps(p, first_lanes(n), _mm512_cvtpd_ps(reinterpret_cast<__m512d>(v)));
}
PK_HD void store_sizes(int64_t* p, int64_t size, int64_t n) {
  _mm512_mask_storeu_epi64(p, first_lanes(n), _mm512_set1_epi64(size));
}
PK_HD double sum_lanes(VecD v) { return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v)); }
#elif defined(__AVX2__)
// n is a constant for whole vectors. Masked loads are cheap, masked stores are not.
PK_HD __m256i first_lanes(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
PK_HD __m128i first_words(int64_t n) { return _mm_cmpgt_epi32(_mm_set1_epi32(int(n)), _mm_setr_epi32(0, 1, 2, 3)); }
PK_HD VecD load_wide(const double* p, int64_t n) {
  return reinterpret_cast<VecD>(n == kWide ? _mm256_loadu_pd(p) : _mm256_maskload_pd(p, first_lanes(n)));
}
PK_HD VecD load_wide(const float* p, int64_t n) {
  return reinterpret_cast<VecD>(_mm256_cvtps_pd(n == kWide ? _mm_loadu_ps(p) : _mm_maskload_ps(p, first_words(n))));
}
PK_HD VecD keep_lanes(VecD v, int64_t n) {
  if (n == kWide) return v;
  return reinterpret_cast<VecD>(_mm256_and_pd(reinterpret_cast<__m256d>(v), _mm256_castsi256_pd(first_lanes(n))));
}
template <class T, class V> PK_HD void store_lanes(T* p, V v, int64_t n) {
  if (n == kWide) return void(__builtin_memcpy(p, &v, sizeof v));
  T x[kWide];
  __builtin_memcpy(x, &v, sizeof v);
  for (int64_t i = 0; i < n; i++) p[i] = x[i];
}
PK_HD void store_wide(double* p, VecD v, int64_t n) { store_lanes(p, v, n); }
PK_HD void store_wide(float* p, VecD v, int64_t n) { store_lanes(p, _mm256_cvtpd_ps(reinterpret_cast<__m256d>(v)), n); }
PK_HD void store_sizes(int64_t* p, int64_t size, int64_t n) { store_lanes(p, _mm256_set1_epi64x(size), n); }
PK_HD double sum_lanes(VecD v) {
  const __m256d x = reinterpret_cast<__m256d>(v);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
#else
template <class S> PK_HD VecD load_wide(const S* p, int64_t n) {
  return n == 1 ? VecD{double(p[0]), 0} : VecD{double(p[0]), double(p[1])};
}
PK_HD VecD keep_lanes(VecD v, int64_t n) { return n == 1 ? VecD{v[0], 0} : v; }
template <class S> PK_HD void store_wide(S* p, VecD v, int64_t n) {
  p[0] = S(v[0]);
  if (n > 1) p[1] = S(v[1]);
}
PK_HD void store_sizes(int64_t* p, int64_t size, int64_t n) {
  p[0] = size;
  if (n > 1) p[1] = size;
}
PK_HD double sum_lanes(VecD v) { return v[0] + v[1]; }
#endif

// ---- runs of equal ids ----------------------------------------------------------------------------------------------

// f(offset, lanes) over [0, n) in whole vectors and the rest.
template <class F> PK_HD void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) f(i, int64_t(kWide));
  if (i < n) f(i, n - i);
}

template <class S> PK_HD double run_sum(const S* p, int64_t n) {
  VecD sum = {};
  for_vectors(n, [&](int64_t i, int64_t lanes) { sum += load_wide(p + i, lanes); });
  return sum_lanes(sum);
}
template <class S> PK_HD double run_deviations(const S* p, int64_t n, double mean) {
  VecD sum = {};
  for_vectors(n, [&](int64_t i, int64_t lanes) { sum += keep_lanes(load_wide(p + i, lanes) - mean, lanes); });
  return sum_lanes(sum);
}
template <class S> PK_HD double run_squares(const S* p, int64_t n, double mean) {
  VecD sum = {};
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const VecD d = keep_lanes(load_wide(p + i, lanes) - mean, lanes);
    sum += d * d;
  });
  return sum_lanes(sum);
}

template <class S> PK_HD void write_run(const GroupArgs<S>& a, int64_t first, int64_t n, const GroupMoments& g) {
  const VecD mean = splat_wide(g.mean), std = splat_wide(g.std);
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const int64_t row = first + i;
    store_wide(a.advantages + row, (load_wide(a.rewards + row, lanes) - g.center) * g.scale, lanes);
    store_wide(a.mean + row, mean, lanes);
    store_wide(a.std + row, std, lanes);
    store_sizes(a.sizes + row, n, lanes);
  });
}

// Groups by the batch: what needs divisions and square roots is done in vectors over the groups.
constexpr int64_t kBatch = 64, kBatchRows = 4096;
struct Batch {
  int64_t first[kBatch + 1];
  alignas(64) double n[kBatch], mean[kBatch], squares[kBatch], std[kBatch], center[kBatch], scale[kBatch];
};
PK_HD void finish(const AdvantageRule& rule, Batch& b, int64_t groups) {
  for (int64_t k = 0; k < groups; k++) {
    const GroupMoments g = group_moments(rule, b.n[k], b.mean[k], b.squares[k]);
    b.std[k] = g.std;
    b.center[k] = g.center;
    b.scale[k] = g.scale;
  }
}

// From the boundaries of k runs to their results. N: the length of all of them, known when compiling; 0: any lengths.
template <int N, class S> bool solve(const GroupArgs<S>& a, Batch& b, int64_t k) {
  const auto run = [&](int64_t j) { return a.rewards + b.first[j]; };
  const auto size = [&](int64_t j) { return N > 0 ? int64_t(N) : b.first[j + 1] - b.first[j]; };
  for (int64_t j = 0; j < k; j++) {
    b.n[j] = double(size(j));
    b.mean[j] = run_sum(run(j), size(j));
  }
  for (int64_t j = 0; j < k; j++) b.mean[j] = group_mean(b.mean[j], b.n[j]);
  if (sizeof(S) == 8) {
    for (int64_t j = 0; j < k; j++) b.squares[j] = run_deviations(run(j), size(j), b.mean[j]);
    for (int64_t j = 0; j < k; j++) b.mean[j] = refine_mean(b.mean[j], b.squares[j], b.n[j]);
  }
  for (int64_t j = 0; j < k; j++) b.squares[j] = run_squares(run(j), size(j), b.mean[j]);
  finish(a.rule, b, k);
  double check = 0;
  for (int64_t j = 0; j < k; j++) {
    check += 0.0 * b.mean[j];
    write_run(a, b.first[j], size(j), {b.mean[j], b.std[j], b.center[j], b.scale[j]});
  }
  return check == 0;
}

template <class S> bool runs(const GroupArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t* ids = a.group;
  int64_t i = begin, n = 1;
  while (i > 0 && i < end && ids[i] == ids[i - 1]) i++;  // the task before has this run
  bool finite = true;
  while (i < end) {
    Batch b;
    const int64_t rows_end = i + kBatchRows < end ? i + kBatchRows : end;
    int64_t k = 0;
    bool uniform = true;
    while (k < kBatch && i < rows_end) {
      // Runs as long as the last one. In ascending order, equal ends mean that all between are equal.
      const int64_t bound = rows_end < a.count - n ? rows_end : a.count - n;
      while (k < kBatch && i < bound && ids[i + n - 1] == ids[i] && ids[i + n] != ids[i]) {
        b.first[k++] = i;
        i += n;
      }
      if (k == kBatch || i >= rows_end) break;
      int64_t next = i + 1;
      while (next < a.count && ids[next] == ids[i]) next++;
      uniform &= k == 0 || next - i == n;
      n = next - i;
      b.first[k++] = i;
      i = next;
    }
    b.first[k] = i;
    const auto body = !uniform  ? &solve<0, S>
                      : n == 4  ? &solve<4, S>
                      : n == 8  ? &solve<8, S>
                      : n == 16 ? &solve<16, S>
                                : &solve<0, S>;
    finite &= body(a, b, k);
  }
  return finite;
}

bool ascending(const int64_t* ids, int64_t count) {
  constexpr int64_t block = 2048;
  for (int64_t first = 0; first + 1 < count; first += block) {
    const int64_t last = first + block < count - 1 ? first + block : count - 1;
    int64_t bad = 0;
    for (int64_t i = first; i < last; i++) bad |= ids[i] > ids[i + 1];
    if (bad) return false;
  }
  return true;
}

// ---- ids in any order -----------------------------------------------------------------------------------------------

template <class T> class Buffer {
 public:
  explicit Buffer(int64_t n, bool zero = false)
      : p_(static_cast<T*>(zero ? std::calloc(n + 1, sizeof(T)) : std::malloc((n + 1) * sizeof(T)))) {
    if (!p_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return p_[i]; }

 private:
  T* p_;
};

// slot[i]: number of the group of row i, groups counted in order of appearance. Returns how many there are.
int64_t number_by_index(const int64_t* ids, int64_t count, int64_t low, int64_t range, int64_t* slot) {
  Buffer<int32_t> table(range, true);  // number + 1; 0: not met yet
  int32_t groups = 0;
  for (int64_t i = 0; i < count; i++) {
    int32_t& entry = table[ids[i] - low];
    groups += entry == 0;  // no branch: when groups begin cannot be foretold
    entry = entry == 0 ? groups : entry;
    slot[i] = entry - 1;
  }
  return groups;
}

int64_t number_by_hash(const int64_t* ids, int64_t count, int64_t* slot) {
  int bits = 4;
  while ((int64_t(1) << bits) < 2 * count) bits++;
  const int64_t mask = (int64_t(1) << bits) - 1;
  Buffer<int32_t> table(mask + 1, true);  // row of the first member + 1
  int64_t groups = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = ids[i];
    int64_t k = int64_t(uint64_t(id) * 0x9e3779b97f4a7c15u >> (64 - bits));
    int32_t found;
    while ((found = table[k]) != 0 && ids[found - 1] != id) k = (k + 1) & mask;
    if (found == 0) table[k] = int32_t(i) + 1;
    slot[i] = found == 0 ? groups++ : slot[found - 1];
  }
  return groups;
}

// What a group's sums turn into, in place: sum -> mean -> center, squares -> scale.
template <class S> struct Group {
  double center, scale;
  S std;
  int32_t size;
};

template <class S> bool scattered(const GroupArgs<S>& a) {
  const int64_t count = a.count;
  int64_t low = a.group[0], high = low;
  for (int64_t i = 0; i < count; i++) {
    low = a.group[i] < low ? a.group[i] : low;
    high = a.group[i] > high ? a.group[i] : high;
  }
  const uint64_t range = uint64_t(high) - uint64_t(low);
  int64_t* slot = a.sizes;  // its values come last
  const int64_t groups = range <= uint64_t(4 * count + 1024) ? number_by_index(a.group, count, low, int64_t(range) + 1, slot)
                                                             : number_by_hash(a.group, count, slot);
  Buffer<Group<S>> group(groups, true);
  for (int64_t i = 0; i < count; i++) {
    Group<S>& g = group[slot[i]];
    g.center += a.rewards[i];
    g.size++;
  }
  for (int64_t k = 0; k < groups; k++) group[k].center = group_mean(group[k].center, group[k].size);
  if (sizeof(S) == 8) {
    for (int64_t i = 0; i < count; i++) group[slot[i]].scale += a.rewards[i] - group[slot[i]].center;
    for (int64_t k = 0; k < groups; k++) {
      group[k].center = refine_mean(group[k].center, group[k].scale, group[k].size);
      group[k].scale = 0;
    }
  }
  for (int64_t i = 0; i < count; i++) {
    Group<S>& g = group[slot[i]];
    const double d = a.rewards[i] - g.center;
    g.scale += d * d;
  }
  double check = 0;
  for (int64_t first = 0; first < groups; first += kBatch) {
    Batch b;
    const int64_t n = first + kBatch < groups ? kBatch : groups - first;
    Group<S>* g = &group[first];
    for (int64_t k = 0; k < n; k++) {
      b.n[k] = g[k].size;
      b.mean[k] = g[k].center;
      b.squares[k] = g[k].scale;
      check += 0.0 * g[k].center;
    }
    finish(a.rule, b, n);
    for (int64_t k = 0; k < n; k++) {
      g[k].center = b.center[k];
      g[k].scale = b.scale[k];
      g[k].std = S(b.std[k]);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const Group<S> g = group[slot[i]];
    const S r = a.rewards[i];
    a.advantages[i] = S((r - g.center) * g.scale);
    a.mean[i] = g.size == 1 ? r : S(g.center);  // only a group of one has another center than its mean
    a.std[i] = g.std;
    a.sizes[i] = g.size;
  }
  return check == 0;
}

}  // namespace

extern const GroupStatsCpu group_stats_cpu;
const GroupStatsCpu group_stats_cpu = {&ascending, &runs<float>, &runs<double>, &scattered<float>, &scattered<double>};

}  // namespace PK_ISA
}  // namespace prefkern
