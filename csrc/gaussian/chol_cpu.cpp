// The CPU walk of chol.h, on one thread. The factor lies in rows, so a triangular solution is a dot product per row; the change of
// rank one solves first, which tells all of its steps, and then goes over the rows, eight at a time, since what is done to a row
// has to wait for itself at every column.
#include "gaussian/chol_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int kSums = 4, kPanel = 8;

double dot(const double* a, const double* b, int64_t n) {
  VecD sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWide <= n; i += kSums * kWide)
    for (int s = 0; s < kSums; s++) sums[s] += load_wide(a + i + s * kWide, kWide) * load_wide(b + i + s * kWide, kWide);
  double sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

void append(const CholArgs& a, double* row) {
  for (int64_t i = 0; i < a.size; i++) {
    const double* l = a.factor + i * a.stride;
    row[i] = (a.vector[i] - dot(l, row, i)) / l[i];
  }
  const double pivot = a.vector[a.size] - dot(row, row, a.size);
  *a.pivot = pivot;
  if (!(pivot > 0)) return;
  double* to = a.factor + a.size * a.stride;
  for (int64_t i = 0; i < a.size; i++) to[i] = row[i];
  to[a.size] = vsqrt(pivot);
}

PK_HD void step(const RankOneStep& s, double& entry, double& w) {
  w -= s.p * entry;
  entry = s.keep * entry + s.add * w;
}

void rank1(const CholArgs& a, RankOneStep* steps, double* p) {
  const int64_t n = a.size;
  int64_t first = 0;  // before it nothing changes
  while (first < n && a.vector[first] == 0) p[first++] = 0;
  double smallest = __builtin_inf(), beta = 1;
  for (int64_t i = 0; i < n; i++) {
    const double* l = a.factor + i * a.stride;
    if (i >= first) p[i] = (a.vector[i] - dot(l + first, p + first, i - first)) / l[i];
    steps[i] = rank_one_step(a.sigma, p[i], beta);
    const double pivot = l[i] * l[i] * (steps[i].beta / beta);
    beta = steps[i].beta;
    if (!(pivot > 0)) return void(*a.pivot = pivot);
    smallest = pivot < smallest ? pivot : smallest;
  }
  *a.pivot = smallest;
  for (int64_t i = first; i < n; i += kPanel) {
    const int64_t rows = n - i < kPanel ? n - i : kPanel;
    double* l[kPanel];
    double w[kPanel];
    for (int64_t r = 0; r < rows; r++) {
      l[r] = a.factor + (i + r) * a.stride;
      w[r] = a.vector[i + r];
    }
    if (rows == kPanel) {
      for (int64_t j = first; j < i; j++)
#pragma GCC unroll 8
        for (int r = 0; r < kPanel; r++) step(steps[j], l[r][j], w[r]);
    } else {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = first; j < i; j++) step(steps[j], l[r][j], w[r]);
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = i; j < i + r; j++) step(steps[j], l[r][j], w[r]);
      l[r][i + r] *= steps[i + r].keep;
    }
  }
}

}  // namespace

extern const CholCpu chol_cpu;
const CholCpu chol_cpu = {&append, &rank1};

}  // namespace PK_ISA
}  // namespace prefkern
