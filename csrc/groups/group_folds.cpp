// The CPU walk of group_folds.h: rows are put in the order of their groups, groups are shared out over torch's threads. Rows
// are gathered and everything is in double, so there is little for vector instructions; this file is compiled once.
#include "groups/group_folds.h"

#include <algorithm>

#include "core/parallel.h"

namespace prefkern {
namespace {

constexpr int64_t kRowsPerTask = 1 << 14;

// The rows of a group, in the order in which they lie in memory.
struct Members {
  const int64_t *first, *last;
  int64_t size() const { return last - first; }
  const int64_t* begin() const { return first; }
  const int64_t* end() const { return last; }
};

template <class F> void for_groups(const GroupRows& rows, const F& f) {
  const GroupIndex index = group_index(rows.ids, rows.count);
  const int64_t grain = std::max<int64_t>(1, kRowsPerTask * index.groups() / std::max<int64_t>(1, rows.count));
  parallel_for(0, index.groups(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
      f(Members{index.order.data() + index.offsets[k], index.order.data() + index.offsets[k + 1]});
  });
}

template <class S> void reduce(const GroupReduceArgs<S>& a) {
  for_groups(a.rows, [&](const Members& members) {
    GroupFold f;
    for (int64_t row : members)
      if (!a.mask || a.mask[row]) fold(f, double(a.values[row]));
    const double center = fold_center(a.reduction, f);
    double second = 0;
    if (needs_second_look(a.reduction))
      for (int64_t row : members)
        if (!a.mask || a.mask[row]) second += second_term(a.reduction, center, double(a.values[row]));
    const S result = S(reduced(a.reduction, f, center, second));
    for (int64_t row : members) a.result[row] = result;
  });
}

template <class S> void normalize(const NormalizeArgs<S>& a) {
  for_groups(a.rows, [&](const Members& members) {
    double sum = 0, deviations = 0, squares = 0;
    for (int64_t row : members) sum += double(a.x[row]);
    const double n = double(members.size()), near = sum / n;
    for (int64_t row : members) deviations += double(a.x[row]) - near;
    const double mean = near + deviations / n;
    for (int64_t row : members) {
      const double d = double(a.x[row]) - mean;
      squares += d * d;
    }
    const Normalizer g = normalizer(a.rule, n, mean, squares);
    for (int64_t row : members) {
      a.z[row] = S(normalized(g, double(a.x[row])));
      a.scale[row] = S(g.scale);
      a.slope[row] = S(g.slope);
    }
  });
}

template <class S> void normalize_backward(const NormalizeGradArgs<S>& a) {
  for_groups(a.rows, [&](const Members& members) {
    double sum = 0, sum_z = 0;
    for (int64_t row : members) {
      sum += double(a.upstream[row]);
      sum_z += double(a.upstream[row]) * double(a.z[row]);
    }
    const double mean = sum / double(members.size());
    for (int64_t row : members)
      a.grad[row] =
          S(normalize_grad(double(a.upstream[row]), double(a.z[row]), double(a.scale[row]), double(a.slope[row]), mean, sum_z));
  });
}

}  // namespace

void cpu_group_reduce(const GroupReduceArgs<float>& args) { reduce(args); }
void cpu_group_reduce(const GroupReduceArgs<double>& args) { reduce(args); }
void cpu_group_normalize(const NormalizeArgs<float>& args) { normalize(args); }
void cpu_group_normalize(const NormalizeArgs<double>& args) { normalize(args); }
void cpu_group_normalize_backward(const NormalizeGradArgs<float>& args) { normalize_backward(args); }
void cpu_group_normalize_backward(const NormalizeGradArgs<double>& args) { normalize_backward(args); }

}  // namespace prefkern
