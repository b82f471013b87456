// CPU entry points of listwise.h: pick the instruction set, share the lists out over torch's threads.
#include "lists/listwise.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "lists/listwise_cpu.h"

namespace prefkern {

PK_ISA_TABLE(ListwiseCpu, listwise_cpu)

namespace {

constexpr int64_t kPairsPerTask = 1 << 17;

template <class S, class Body> void run(const ListArgs<S>& args, Body body) {
  const int64_t k = args.items, pairs = std::max<int64_t>(1, k * k);
  std::vector<S> discounts;
  if (args.rule.kind == ListKind::lambda) {
    discounts.resize(k + 2);
    for (int64_t r = 1; r < k + 2; r++) discounts[r] = S(list_discount(double(r)));
  }
  const int64_t grain = std::max<int64_t>(kMostLanes, kPairsPerTask / pairs / kMostLanes * kMostLanes);
  parallel_for(0, args.out.rows, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<S[]> scratch(new S[kListArrays * kMostLanes * (k + 1)]);
    body(args, discounts.data(), scratch.get(), begin, end);
  });
  finish_rows(args.out);
}

}  // namespace

void cpu_listwise(const ListArgs<float>& args) { run(args, listwise_cpu().lists_f32); }
void cpu_listwise(const ListArgs<double>& args) { run(args, listwise_cpu().lists_f64); }

}  // namespace prefkern
