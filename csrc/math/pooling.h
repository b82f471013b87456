// Means over the tokens of each step of a sequence. A token says which step it belongs to: 1 to the number of steps, or 0
// for none. With `clamp`, ids above belong to the last step.
#pragma once
#include "core/elementary.h"

namespace prefkern {
inline namespace PK_ISA {

constexpr int64_t kRefusedStep = -1;

PK_HD int64_t pooled_step(int64_t id, int64_t steps, bool clamp) {
  if (id > steps) return clamp ? steps : kRefusedStep;
  return id >= 0 ? id : kRefusedStep;
}

// Of a sum over `count` tokens; and of what comes from upstream, the share of each of them. V: a number or a vector.
template <class V, class S> PK_HD V pooled_mean(V sum, S count) { return sum / count; }

}  // namespace PK_ISA
}  // namespace prefkern
