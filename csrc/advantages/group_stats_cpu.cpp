// The CPU walk of group_stats.h.
//
// Ids in ascending order (what a trainer that repeats each prompt has) make every group a run of adjacent rewards. A run
// is loaded into vectors of double, summed, centred, squared and written without leaving the registers. Mostly its length
// is that of the run before: then as many groups as a vector has lanes are worked on together, so that means, square roots
// and divisions are vector code too.
//
// Otherwise, unless the ids are numbers without large gaps, they are numbered first, in order of appearance: by direct index where
// their range is small, by an open-addressing hash table where not. Three sweeps follow: sums, squared deviations, results.
//
// What these two do not cover (several columns, NaN, estimators with sums of their own, a batch rule) walks over lists of
// rows, a group at a time.
#include "advantages/group_stats_cpu.h"

#include <cstdlib>
#include <new>

#include "core/simd_ids.h"
#include "core/simd_wide.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

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
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const int64_t row = first + i;
    store_wide(a.advantages + row, (load_wide(a.rewards + row, lanes) - g.center) * g.scale, lanes);
  });
  if (!a.mean && !a.std && !a.sizes) return;
  const VecD mean = splat_wide(g.mean), std = splat_wide(g.std);
  for_vectors(n, [&](int64_t i, int64_t lanes) {
    const int64_t row = first + i;
    if (a.mean) store_wide(a.mean + row, mean, lanes);
    if (a.std) store_wide(a.std + row, std, lanes);
    if (a.sizes) store_sizes(a.sizes + row, n, lanes);
  });
}

// Groups by the batch: what needs divisions and square roots is done in vectors over the groups.
constexpr int64_t kBatch = 64, kBatchRows = 4096;
struct Batch {
  int64_t first[kBatch + 1];
  alignas(64) double n[kBatch], mean[kBatch], squares[kBatch], std[kBatch], center[kBatch], scale[kBatch];
};
PK_HD void finish(const AdvantageRule& rule, Batch& b, int64_t from, int64_t groups) {
  const auto each = [&](auto moments) {
    for (int64_t k = from; k < groups; k++) {
      const GroupMoments g = moments(rule, b.n[k], b.mean[k], b.squares[k]);
      b.std[k] = g.std;
      b.center[k] = g.center;
      b.scale[k] = g.scale;
    }
  };
  if (rule.virtual_count > 0)
    each([](const AdvantageRule& r, double n, double m, double q) { return virtual_moments(r, n, m, q); });
  else each([](const AdvantageRule& r, double n, double m, double q) { return group_moments(r, n, m, q); });
}

// Runs of N rewards one after another, by as many as a vector has lanes, with the sums and the formula of solve<N>. One
// step for all runs before the next: the latencies of a run's sums, root and divisions then overlap with those of others.
constexpr bool side_by_side(int n) { return n > 0 && n % kWide == 0 && n <= 16; }
template <int N> bool solve_side_by_side(const GroupArgs<float>& a, int64_t first, int64_t groups) {
  constexpr int parts = N / kWide;
  const VecD n = splat_wide(N);
  const float* r = a.rewards + first;
  float* out = a.advantages + first;
  alignas(64) double mean[kBatch], squares[kBatch], center[kBatch], scale[kBatch];
  const auto each_sum = [&](int64_t k, auto&& value) {
    VecD sums[kWide];
    for (int j = 0; j < kWide; j++) {
      sums[j] = VecD{};
      for (int p = 0; p < parts; p++) value(sums[j], k + j, load_wide(r + (k + j) * N + p * kWide, kWide));
    }
    return sum_each(sums);
  };
  VecD check = {};
  for (int64_t k = 0; k < groups; k += kWide) {
    const VecD m = group_mean(each_sum(k, [](VecD& sum, int64_t, VecD x) { sum += x; }), n);
    __builtin_memcpy(mean + k, &m, sizeof m);
    check += 0.0 * m;
  }
  for (int64_t k = 0; k < groups; k += kWide) {
    const VecD q = each_sum(k, [&](VecD& sum, int64_t j, VecD x) {
      const VecD d = x - mean[j];
      sum += d * d;
    });
    __builtin_memcpy(squares + k, &q, sizeof q);
  }
  for (int64_t k = 0; k < groups; k += kWide) {
    VecD m, q;
    __builtin_memcpy(&m, mean + k, sizeof m);
    __builtin_memcpy(&q, squares + k, sizeof q);
    const MomentsOf<VecD> g = group_moments(a.rule, n, m, q);
    __builtin_memcpy(center + k, &g.center, sizeof g.center);
    __builtin_memcpy(scale + k, &g.scale, sizeof g.scale);
  }
  for (int64_t j = 0; j < groups; j++)
    for (int p = 0; p < parts; p++)
      store_wide(out + j * N + p * kWide, (load_wide(r + j * N + p * kWide, kWide) - center[j]) * scale[j], kWide);
  return sum_lanes(check) == 0;
}

// From the boundaries of k runs to their results. N: the length of all of them, known when compiling; 0: any lengths.
template <int N, class S> bool solve(const GroupArgs<S>& a, Batch& b, int64_t k) {
  int64_t from = 0;
  bool finite = true;
  if constexpr (sizeof(S) == 4 && side_by_side(N)) {
    if (!a.mean && !a.std && !a.sizes && a.rule.virtual_count == 0)
      finite = solve_side_by_side<N>(a, b.first[0], from = k / kWide * kWide);
  }
  const auto run = [&](int64_t j) { return a.rewards + b.first[j]; };
  const auto size = [&](int64_t j) { return N > 0 ? int64_t(N) : b.first[j + 1] - b.first[j]; };
  for (int64_t j = from; j < k; j++) {
    b.n[j] = double(size(j));
    b.mean[j] = run_sum(run(j), size(j));
  }
  for (int64_t j = from; j < k; j++) b.mean[j] = group_mean(b.mean[j], b.n[j]);
  if (sizeof(S) == 8) {
    for (int64_t j = from; j < k; j++) b.squares[j] = run_deviations(run(j), size(j), b.mean[j]);
    for (int64_t j = from; j < k; j++) b.mean[j] = refine_mean(b.mean[j], b.squares[j], b.n[j]);
  }
  for (int64_t j = from; j < k; j++) b.squares[j] = run_squares(run(j), size(j), b.mean[j]);
  finish(a.rule, b, from, k);
  double check = 0;
  for (int64_t j = from; j < k; j++) {
    check += 0.0 * b.mean[j];
    write_run(a, b.first[j], size(j), {b.mean[j], b.std[j], b.center[j], b.scale[j]});
  }
  return finite & (check == 0);
}

template <class S> RunsResult runs(const GroupArgs<S>& a, int64_t begin, int64_t end) {
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
      const int64_t bound = rows_end < a.count - n ? rows_end : a.count - n;
      while (k < kBatch && i < bound && ids[i + n] > ids[i] && equal_ids(ids + i, n)) {
        b.first[k++] = i;
        i += n;
      }
      if (k == kBatch || i >= rows_end) break;
      int64_t next = i + 1;
      while (next < a.count && ids[next] == ids[i]) next++;
      if (next < a.count && ids[next] < ids[i]) return RunsResult::not_ascending;
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
  return finite ? RunsResult::done : RunsResult::not_finite;
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
  Buffer<int32_t> table(mask + 1, true);  // row of the first member + 1
  int64_t groups = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = ids[i];
    int64_t k = int64_t(uint64_t(id) * 0x9e3779b97f4a7c15u >> (64 - bits));
    int32_t found;
    while ((found = table[k]) != 0 && ids[found - 1] != id) k = (k + 1) & mask;
    if (found == 0) table[k] = int32_t(i) + 1;
    slot[i] = found == 0 ? int32_t(groups++) : slot[found - 1];
  }
  return groups;
}

// Of every group what the sweeps over the rows look up, in as little memory as possible, since the groups are met in any order:
// sum -> mean -> center, and squares -> scale.
struct Group {
  double center, scale;
};

template <class S, class Slot> bool sweeps(const GroupArgs<S>& a, int64_t groups, const Slot& slot) {
  const int64_t count = a.count;
  Buffer<Group> group(groups, true);
  Buffer<int32_t> size(groups, true);
  for (int64_t i = 0; i < count; i++) {
    const int64_t k = slot(i);
    group[k].center += a.rewards[i];
    size[k]++;
  }
  const auto n = [&](int64_t k) { return double(size[k] > 0 ? size[k] : 1); };  // an id that nobody has is a group of one 0
  for (int64_t k = 0; k < groups; k++) group[k].center = group_mean(group[k].center, n(k));
  if (sizeof(S) == 8) {
    for (int64_t i = 0; i < count; i++) group[slot(i)].scale += a.rewards[i] - group[slot(i)].center;
    for (int64_t k = 0; k < groups; k++) {
      group[k].center = refine_mean(group[k].center, group[k].scale, n(k));
      group[k].scale = 0;
    }
  }
  for (int64_t i = 0; i < count; i++) {
    Group& g = group[slot(i)];
    const double d = a.rewards[i] - g.center;
    g.scale += d * d;
  }
  Buffer<S> mean(a.mean ? groups : 0), std(a.std ? groups : 0);
  double check = 0;
  for (int64_t first = 0; first < groups; first += kBatch) {
    Batch b;
    const int64_t some = first + kBatch < groups ? kBatch : groups - first;
    for (int64_t k = 0; k < some; k++) {
      const Group& g = group[first + k];
      b.n[k] = n(first + k);
      b.mean[k] = g.center;
      b.squares[k] = g.scale;
      check += 0.0 * g.center;
    }
    finish(a.rule, b, 0, some);
    for (int64_t k = 0; k < some; k++) {
      group[first + k] = {b.center[k], b.scale[k]};
      if (a.mean) mean[first + k] = S(b.mean[k]);
      if (a.std) std[first + k] = S(b.std[k]);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const Group& g = group[slot(i)];
    a.advantages[i] = S((a.rewards[i] - g.center) * g.scale);
  }
  if (a.mean)
    for (int64_t i = 0; i < count; i++) a.mean[i] = mean[slot(i)];
  if (a.std)
    for (int64_t i = 0; i < count; i++) a.std[i] = std[slot(i)];
  if (a.sizes)
    for (int64_t i = 0; i < count; i++) a.sizes[i] = size[slot(i)];
  return check == 0;
}

template <class S> bool scattered(const GroupArgs<S>& a) {
  const int64_t count = a.count, *ids = a.group;
  int64_t low = ids[0], high = low;
  for (int64_t i = 0; i < count; i++) {
    low = ids[i] < low ? ids[i] : low;
    high = ids[i] > high ? ids[i] : high;
  }
  const uint64_t range = uint64_t(high) - uint64_t(low);
  // Mostly ids leave no large gaps, and are numbers of groups themselves.
  if (range < uint64_t(count)) return sweeps(a, int64_t(range) + 1, [=](int64_t i) { return ids[i] - low; });
  Buffer<int32_t> numbers(count);
  int32_t* slot = &numbers[0];
  const int64_t groups = range <= uint64_t(4 * count + 1024) ? number_by_index(ids, count, low, int64_t(range) + 1, slot)
                                                             : number_by_hash(ids, count, slot);
  return sweeps(a, groups, [=](int64_t i) { return int64_t(slot[i]); });
}

// ---- any rule, by lists of rows ---------------------------------------------------------------------------------------

// The sums of one column of a group. x: its rewards, NaN for one that takes no part. best: where pass_at_k's best is.
template <class S>
GroupSums column_sums(const GroupArgs<S>& a, const int64_t* rows, int64_t n, const double* x, int64_t& best) {
  const bool opo = a.rule.estimator == AdvantageEstimator::opo;
  GroupSums s;
  s.rows = double(n);
  best = -1;
  bool all = !opo && !finds_best(a.rule.estimator);  // mostly: every reward takes part, and no branch is needed
  for (int64_t i = 0; i < n; i++) all &= x[i] == x[i];
  if (all) {
    s.n = double(n);
    for (int64_t i = 0; i < n; i++) {
      s.sum += x[i];
      s.low = x[i] < s.low ? x[i] : s.low;
      s.high = x[i] > s.high ? x[i] : s.high;
    }
    const double mean = group_mean(s);
    for (int64_t i = 0; i < n; i++) {
      const double d = x[i] - mean;
      s.squares += d * d;
      s.deviations += d < 0 ? -d : d;
    }
    return s;
  }
  for (int64_t i = 0; i < n; i++) {
    if (x[i] != x[i]) continue;
    s.n += 1;
    s.sum += x[i];
    s.low = x[i] < s.low ? x[i] : s.low;
    if (x[i] > s.high) {
      s.second = s.high;
      s.high = x[i];
      best = i;
    } else if (x[i] > s.second) {
      s.second = x[i];
    }
    if (opo) {
      const double length = row_length(a, rows[i]);
      s.tokens += length;
      s.weighted += length * x[i];
    }
  }
  const double mean = group_mean(s);
  for (int64_t i = 0; i < n; i++) {
    const double d = x[i] == x[i] ? x[i] - mean : 0.0;
    s.squares += d * d;
    s.deviations += d < 0 ? -d : d;
  }
  return s;
}

template <class S>
bool listed(const GroupArgs<S>& a, const int64_t* order, const int64_t* offsets, int64_t begin, int64_t end) {
  int64_t largest = 0;
  bool tokens = true;
  for (int64_t g = begin; g < end; g++) largest = offsets[g + 1] - offsets[g] > largest ? offsets[g + 1] - offsets[g] : largest;
  Buffer<double> reward(largest), sum(largest);
  Buffer<bool> any(largest);
  double* x = &reward[0];
  const int64_t columns = estimated_columns(a);
  const double nothing = __builtin_nan("");
  for (int64_t g = begin; g < end; g++) {
    const int64_t* rows = order + offsets[g];
    const int64_t n = offsets[g + 1] - offsets[g];
    for (int64_t i = 0; i < n; i++) {
      sum[i] = 0;
      any[i] = false;
    }
    for (int64_t k = 0; k < columns; k++) {
      for (int64_t i = 0; i < n; i++) x[i] = estimated_reward(a, rows[i], k);
      int64_t best;
      const GroupSums s = column_sums(a, rows, n, x, best);
      const GroupMoments m = group_estimate(a.rule, s);
      if (a.rule.estimator == AdvantageEstimator::opo && s.n > 1 && s.tokens == 0) tokens = false;
      const bool only_best = finds_best(a.rule.estimator);
      const double weight = estimated_weight(a, k);
      for (int64_t i = 0; i < n; i++) {
        if (x[i] != x[i]) continue;
        any[i] = true;
        if (!only_best || i == best) sum[i] += weight * advantage(m, x[i]);
      }
      if (!a.mean && !a.std && !a.sizes && !a.min && !a.max) continue;
      const bool none = s.n == 0;
      for (int64_t i = 0; i < n; i++) {
        const int64_t at = rows[i] * columns + k;
        if (a.mean) a.mean[at] = S(none ? nothing : m.mean);
        if (a.std) a.std[at] = S(none ? nothing : m.std);
        if (a.min) a.min[at] = S(none ? nothing : s.low);
        if (a.max) a.max[at] = S(none ? nothing : s.high);
        if (a.sizes) a.sizes[at] = int64_t(s.n);
      }
    }
    for (int64_t i = 0; i < n; i++) {
      if (a.batch == BatchRule::none) a.advantages[rows[i]] = S(sum[i]);
      else a.values[rows[i]] = any[i] ? sum[i] : kLeftOut;
    }
  }
  return tokens;
}

template <class S> Moments batch_moments(const GroupArgs<S>& a, int64_t begin, int64_t end) {
  Moments m;
  double sum = 0;
  for (int64_t i = begin; i < end; i++) {
    const double w = batch_weight(a, i);
    if (w == 0) continue;
    m.n += w;
    sum += w * batch_value(a, i);
  }
  if (m.n == 0) return m;
  m.mean = sum / m.n;
  for (int64_t i = begin; i < end; i++) {
    const double w = batch_weight(a, i);
    if (w == 0) continue;
    const double d = batch_value(a, i) - m.mean;
    m.squares += w * d * d;
  }
  return m;
}

template <class S> void batch_results(const GroupArgs<S>& a, const Affine& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) a.advantages[i] = batch_result(a, f, i);
}

template <class S>
constexpr GroupStatsWalks<S> walks = {&runs<S>, &scattered<S>, &listed<S>, &batch_moments<S>, &batch_results<S>};

}  // namespace

extern const GroupStatsCpu group_stats_cpu;
const GroupStatsCpu group_stats_cpu = {walks<float>, walks<double>};

}  // namespace PK_ISA
}  // namespace prefkern
