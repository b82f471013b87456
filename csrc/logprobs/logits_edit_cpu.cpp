// The CPU walk of logits_edit.h.
#include "logprobs/logits_edit_cpu.h"

#include "core/elementary.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class V, class T> PK_HD V rounded(V x) {
  T narrow[Lanes<V>::count];
  Mem<V>::store(narrow, x);
  return Mem<V>::load(narrow);
}

template <class T> void round_rows(const RoundArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    float* z = a.logits + row * a.cols;
    int64_t i = 0;
    for (; i + kLanes <= a.cols; i += kLanes) {
      const VecF x = Mem<VecF>::load(z + i);
      Mem<VecF>::store(z + i, rounded<VecF, T>(a.bias ? x + Mem<VecF>::load(a.bias + i) : x));
    }
    for (; i < a.cols; i++) z[i] = rounded<float, T>(a.bias ? z[i] + a.bias[i] : z[i]);
  }
}

void round(const RoundArgs& a, int64_t begin, int64_t end) {
  a.to == DType::bf16 ? round_rows<bf16_t>(a, begin, end) : round_rows<f16_t>(a, begin, end);
}

template <class S, class I> void keep_row(const KeepArgs<S>& a, int64_t row) {
  const LogitBlock<S>& b = a.block;
  const LogitTransform<S>& t = b.transform;
  const bool last = b.first_col + b.cols == b.vocab;
  if (b.targets[row] == b.ignore_index) {
    if (a.mean_logit && last) a.mean_logit[row] = 0;
    return;
  }
  S* z = static_cast<S*>(a.logits) + row * b.cols;
  const IdRange range = ids_of_row(a.kept, row);
  const I* ids = static_cast<const I*>(a.kept.ids);
  double sum = 0;
  int64_t done = 0;
  for (int64_t i = first_not_below(ids, range, b.first_col); i < range.end && ids[i] < b.first_col + b.cols; i++) {
    const int64_t col = ids[i] - b.first_col;
    if (col < done) continue;  // ids that do not ascend
    for (; done < col; done++) z[done] = kMinusInf<S>;
    done++;
    z[col] = kept_logit(t, z[col], S(kLowestBf16));
    if (a.mean_logit) sum += pre_logit(t, z[col], t.bias ? t.bias[col] : S(0));
  }
  for (; done < b.cols; done++) z[done] = kMinusInf<S>;
  if (!a.mean_logit) return;
  const S total = (b.first_col > 0 ? a.mean_logit[row] : S(0)) + S(sum);
  a.mean_logit[row] = last ? total / S(range.end - range.begin) * logit_factor(t, row) : total;
}

template <class S> void keep_rows(const KeepArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) a.kept.wide ? keep_row<S, int64_t>(a, row) : keep_row<S, int32_t>(a, row);
}

}  // namespace

extern const LogitsEditCpu logits_edit_cpu;
const LogitsEditCpu logits_edit_cpu = {&round, &keep_rows<float>, &keep_rows<double>};

}  // namespace PK_ISA
}  // namespace prefkern
