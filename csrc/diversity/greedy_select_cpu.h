// Functions that greedy_select_cpu.cpp exports once per instruction set.
#pragma once
#include "diversity/greedy_select.h"

namespace prefkern {

template <class S> struct GreedyParts {
  // Of a range of the embeddings' rows, those of all seeds one behind the other.
  void (*norms)(const GreedyArgs<S>&, int64_t begin, int64_t end);
  // A candidate of a seed over its norm, to unit [d].
  void (*unit)(const GreedyArgs<S>&, int64_t q, int64_t candidate, S* unit);
  // The scores of a range of a seed's candidates, those that were taken left out; `first`: with the seed.
  void (*update)(const GreedyArgs<S>&, int64_t q, const S* unit, bool first, int64_t begin, int64_t end);
};

struct GreedySelectCpu {
  GreedyParts<float> f32, bf16, f16;
  GreedyParts<double> f64;
};
}  // namespace prefkern
