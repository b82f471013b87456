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

}  // namespace

extern const LogitsEditCpu logits_edit_cpu;
const LogitsEditCpu logits_edit_cpu = {&round};

}  // namespace PK_ISA
}  // namespace prefkern
