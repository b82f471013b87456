// CPU entry points of greedy_select.h: pick the instruction set, and share out the seeds over torch's threads, or where they are
// few the candidates of each step.
#include "diversity/greedy_select.h"

#include <algorithm>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "diversity/greedy_select_cpu.h"
#include "math/diversity.h"

namespace prefkern {

PK_ISA_TABLE(GreedySelectCpu, greedy_select_cpu)

namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, width)); }

const GreedyParts<float>& parts(const GreedyArgs<float>& a) {
  const GreedySelectCpu& table = greedy_select_cpu();
  return a.dtype == DType::bf16 ? table.bf16 : a.dtype == DType::f16 ? table.f16 : table.f32;
}
const GreedyParts<double>& parts(const GreedyArgs<double>&) { return greedy_select_cpu().f64; }

template <class S> void run_norms(const GreedyArgs<S>& a) {
  const GreedyParts<S>& p = parts(a);
  const int64_t rows = (a.own_embeddings ? a.seeds : 1) * a.candidates;
  parallel_for(0, rows, rows_per_task(a.width), [&](int64_t begin, int64_t end) { p.norms(a, begin, end); });
}

// The set of one seed; update(unit, first) brings all scores up to date.
template <class S, class Update>
void select(const GreedyArgs<S>& a, int64_t q, std::vector<S>& unit, std::vector<int64_t>& room, const Update& update) {
  const int64_t *types = a.type_id + (a.own_types ? q * a.candidates : 0),
                *quotas = a.quotas + (a.own_quotas ? q * a.types : 0);
  int64_t* chosen = a.chosen + q * a.size;
  S* scores = a.scores + q * a.candidates;
  room.assign(quotas, quotas + a.types);
  unit.resize(a.width);
  int64_t total = 0, last = a.seed[q];
  for (int64_t left : room) total += left;
  std::fill(chosen, chosen + a.size, int64_t(-1));
  for (int64_t step = 0;; step++) {
    chosen[step] = last;
    room[types[last]]--;
    if (step + 1 == total) return;
    parts(a).unit(a, q, last, unit.data());
    update(unit.data(), step == 0);
    scores[last] = S(kTaken);
    last = -1;
    for (int64_t i = 0; i < a.candidates; i++)
      if (room[types[i]] > 0 && !taken(scores[i]) && (last < 0 || scores[i] < scores[last])) last = i;
  }
}

template <class S> void run_select(const GreedyArgs<S>& a) {
  const GreedyParts<S>& p = parts(a);
  const auto sets = [&](int64_t begin, int64_t end) {
    std::vector<S> unit;
    std::vector<int64_t> room;
    for (int64_t q = begin; q < end; q++)
      select(a, q, unit, room, [&](const S* u, bool first) { p.update(a, q, u, first, 0, a.candidates); });
  };
  if (a.seeds >= num_threads()) return parallel_for(0, a.seeds, 1, sets);
  std::vector<S> unit;
  std::vector<int64_t> room;
  for (int64_t q = 0; q < a.seeds; q++)
    select(a, q, unit, room, [&](const S* u, bool first) {
      parallel_for(0, a.candidates, rows_per_task(a.width),
                   [&](int64_t begin, int64_t end) { p.update(a, q, u, first, begin, end); });
    });
}

}  // namespace

void cpu_greedy_norms(const GreedyArgs<float>& args) { run_norms(args); }
void cpu_greedy_norms(const GreedyArgs<double>& args) { run_norms(args); }
void cpu_greedy_select(const GreedyArgs<float>& args) { run_select(args); }
void cpu_greedy_select(const GreedyArgs<double>& args) { run_select(args); }

}  // namespace prefkern
