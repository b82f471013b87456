// The CPU side of row_loss.h.
#include "lists/row_loss.h"

#include "core/parallel.h"

namespace prefkern {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

template <class S> void finish(const RowLoss<S>& r) {
  double sums[kRowSums] = {};
  for (int64_t b = 0; b < r.rows; b++)
    for (int k = 0; k < kRowSums; k++) sums[k] += r.sums[b * kRowSums + k];
  if (r.losses)
    for (int64_t b = 0; b < r.rows; b++) r.losses[b] = S(r.sums[b * kRowSums]);
  const bool has_norm = r.norm >= 0 || r.norm_tensor;
  const double norm = r.norm_tensor ? double(*r.norm_tensor) : r.norm;
  const double divisor = row_divisor(r.reduction, has_norm, norm, sums[kRowCounts]);
  *r.loss = S(row_quotient(sums[kRowLoss], divisor));
  *r.inverse = S(row_quotient(1, divisor));
  r.metrics[kMetricCount] = S(sums[kRowCounts]);
  r.metrics[kMetricFirst] = S(row_quotient(sums[kRowFirst], sums[kRowCounts]));
  r.metrics[kMetricSecond] = S(row_quotient(sums[kRowSecond], sums[kRowCounts]));
}

template <class S> void gradient(const RowGradArgs<S>& a) {
  if (a.rows == 0 || a.columns == 0) return;
  const int64_t grain = kElementsPerTask / a.columns + 1;
  parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const S factor = a.upstream[a.per_row ? b : 0] * *a.inverse;
      for (int64_t i = b * a.columns; i < (b + 1) * a.columns; i++) a.grad[i] = row_gradient(a.unnormalised[i], factor);
    }
  });
}

}  // namespace

void finish_rows(const RowLoss<float>& rows) { finish(rows); }
void finish_rows(const RowLoss<double>& rows) { finish(rows); }
void cpu_row_gradient(const RowGradArgs<float>& args) { gradient(args); }
void cpu_row_gradient(const RowGradArgs<double>& args) { gradient(args); }

}  // namespace prefkern
