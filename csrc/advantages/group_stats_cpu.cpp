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
typedef int64_t VecL __attribute__((vector_size(kWide * 8)));
typedef float NarrowF __attribute__((vector_size(kWide * 4)));

PK_HD VecD load_wide(const double* p) { VecD v; __builtin_memcpy(&v, p, sizeof v); return v; }
PK_HD VecD load_wide(const float* p) {
  NarrowF v; __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, VecD);
}
PK_HD void store_narrow(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }
PK_HD void store_narrow(float* p, VecD v) {
  const NarrowF n = __builtin_convertvector(v, NarrowF);
  __builtin_memcpy(p, &n, sizeof n);
}
PK_HD double sum_lanes(VecD v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v));
#elif defined(__AVX2__)
  const __m256d x = reinterpret_cast<__m256d>(v);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
#else
  double s = 0;
  for (int i = 0; i < kWide; i++) s += v[i];
  return s;
#endif
}
PK_HD VecL lane_numbers() {
  VecL v;
  for (int i = 0; i < kWide; i++) v[i] = i;
  return v;
}

// ---- runs of equal ids ----------------------------------------------------------------------------------------------

// f(vector, offset) over p[0, n), lanes beyond n set to `filler`. What lies behind the run is loaded, but not used, while
// it is inside the array, which has `room` elements from p on.
template <class S, class F> PK_HD void for_vectors(const S* p, int64_t n, int64_t room, VecD filler, F&& f) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) f(load_wide(p + i), i);
  if (i == n) return;
  VecD last;
  if (i + kWide <= room) {
    last = load_wide(p + i);
  } else {
    S copy[kWide] = {};
    for (int64_t k = i; k < n; k++) copy[k - i] = p[k];
    last = load_wide(copy);
  }
  f(lane_numbers() < n - i ? last : filler, i);
}

template <class S> PK_HD GroupMoments run_moments(const AdvantageRule& rule, const S* p, int64_t n, int64_t room) {
  VecD sum = {};
  for_vectors(p, n, room, VecD{}, [&](VecD x, int64_t) { sum += x; });
  double mean = group_mean(sum_lanes(sum), n);
  if (sizeof(S) == 8) {
    sum = VecD{};
    for_vectors(p, n, room, VecD{} + mean, [&](VecD x, int64_t) { sum += x - mean; });
    mean = refine_mean(mean, sum_lanes(sum), n);
  }
  VecD squares = {};
  for_vectors(p, n, room, VecD{} + mean, [&](VecD x, int64_t) { squares += (x - mean) * (x - mean); });
  return group_moments(rule, n, mean, sum_lanes(squares));
}

// Writes a run of n rows from row `first` on. Whole vectors are written while they end before `limit`: what they
// overwrite behind the run comes later in the same task.
template <class S> PK_HD void write_run(const GroupArgs<S>& a, int64_t first, int64_t n, int64_t limit, const GroupMoments& g) {
  typedef S VecS __attribute__((vector_size(kWide * sizeof(S))));
  const VecS mean = VecS{} + S(g.mean), std = VecS{} + S(g.std);
  const VecL size = VecL{} + n;
  const int64_t end = first + n;
  int64_t i = first;
  for (; i < end && i + kWide <= limit; i += kWide) {
    const VecD x = load_wide(a.rewards + i);
    store_narrow(a.advantages + i, (x - g.center) * g.scale);
    __builtin_memcpy(a.mean + i, &mean, sizeof mean);
    __builtin_memcpy(a.std + i, &std, sizeof std);
    __builtin_memcpy(a.sizes + i, &size, sizeof size);
  }
  for (; i < end; i++) {
    a.advantages[i] = S(advantage(g, a.rewards[i]));
    a.mean[i] = S(g.mean);
    a.std[i] = S(g.std);
    a.sizes[i] = n;
  }
}

template <class S> bool runs(const GroupArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t* ids = a.group;
  const int64_t count = a.count;
  int64_t i = begin;
  while (i > 0 && i < end && ids[i] == ids[i - 1]) i++;  // the task before has this run
  int64_t n = 1;
  double check = 0;
  while (i < end) {
    // In ascending order, equal ends mean that all between are equal.
    int64_t next = i + n;
    if (next > count || ids[next - 1] != ids[i]) next = i + 1;
    while (next < count && ids[next] == ids[i]) next++;
    n = next - i;
    const GroupMoments g = run_moments(a.rule, a.rewards + i, n, count - i);
    check += 0.0 * g.mean;
    write_run(a, i, n, next > end ? next : end, g);
    i = next;
  }
  return check == 0;
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
int64_t number_by_index(const int64_t* ids, int64_t count, int64_t low, int64_t range, int32_t* slot) {
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

int64_t number_by_hash(const int64_t* ids, int64_t count, int32_t* slot) {
  int bits = 4;
  while ((int64_t(1) << bits) < 2 * count) bits++;
  const int64_t mask = (int64_t(1) << bits) - 1;
  Buffer<int32_t> table(mask + 1, true);
  Buffer<int64_t> id_of(count);
  int32_t groups = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = ids[i];
    int64_t k = int64_t(uint64_t(id) * 0x9e3779b97f4a7c15u >> (64 - bits));
    int32_t found;
    while ((found = table[k]) != 0 && id_of[found - 1] != id) k = (k + 1) & mask;
    if (found == 0) {
      id_of[groups] = id;
      found = table[k] = ++groups;
    }
    slot[i] = found - 1;
  }
  return groups;
}

struct Sums {
  double sum, squares;
  int64_t size;
};
struct Results {
  double center, scale;
  float mean, std;
};
struct Results64 {
  double center, scale, mean, std;
};
template <class S> struct ResultsOf { using Type = Results; };
template <> struct ResultsOf<double> { using Type = Results64; };

template <class S> bool scattered(const GroupArgs<S>& a) {
  const int64_t count = a.count;
  int64_t low = a.group[0], high = low;
  for (int64_t i = 0; i < count; i++) {
    low = a.group[i] < low ? a.group[i] : low;
    high = a.group[i] > high ? a.group[i] : high;
  }
  Buffer<int32_t> slot(count);
  const uint64_t range = uint64_t(high) - uint64_t(low);
  const int64_t groups = range <= uint64_t(4 * count + 1024) ? number_by_index(a.group, count, low, int64_t(range) + 1, &slot[0])
                                                            : number_by_hash(a.group, count, &slot[0]);
  Buffer<Sums> sums(groups, true);
  for (int64_t i = 0; i < count; i++) {
    Sums& s = sums[slot[i]];
    s.sum += a.rewards[i];
    s.size++;
  }
  for (int64_t k = 0; k < groups; k++) sums[k].sum = group_mean(sums[k].sum, sums[k].size);  // from here on the mean
  if (sizeof(S) == 8) {
    for (int64_t i = 0; i < count; i++) sums[slot[i]].squares += a.rewards[i] - sums[slot[i]].sum;
    for (int64_t k = 0; k < groups; k++) {
      sums[k].sum = refine_mean(sums[k].sum, sums[k].squares, sums[k].size);
      sums[k].squares = 0;
    }
  }
  for (int64_t i = 0; i < count; i++) {
    Sums& s = sums[slot[i]];
    const double d = a.rewards[i] - s.sum;
    s.squares += d * d;
  }
  Buffer<typename ResultsOf<S>::Type> results(groups);
  double check = 0;
  for (int64_t k = 0; k < groups; k++) {
    const GroupMoments g = group_moments(a.rule, sums[k].size, sums[k].sum, sums[k].squares);
    check += 0.0 * g.mean;
    results[k] = {g.center, g.scale, S(g.mean), S(g.std)};
  }
  for (int64_t i = 0; i < count; i++) {
    const auto& r = results[slot[i]];
    a.advantages[i] = S((a.rewards[i] - r.center) * r.scale);
    a.mean[i] = r.mean;
    a.std[i] = r.std;
    a.sizes[i] = sums[slot[i]].size;
  }
  return check == 0;
}

}  // namespace

extern const GroupStatsCpu group_stats_cpu;
const GroupStatsCpu group_stats_cpu = {&ascending, &runs<float>, &runs<double>, &scattered<float>, &scattered<double>};

}  // namespace PK_ISA
}  // namespace prefkern
