// CPU entry points: pick the instruction set, and the walk that the rule and the order of the ids allow.
#include "advantages/group_stats.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "advantages/group_stats_cpu.h"
#include "core/groups.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace prefkern {

PK_ISA_TABLE(GroupStatsCpu, group_stats_cpu)

namespace {

constexpr int64_t kRowsPerTask = 1 << 15, kGroupsPerTask = 1 << 10, kRowsPerPart = 1 << 12;

// False if a reward is not finite.
template <class S> bool run_plain(const GroupArgs<S>& args, const GroupStatsWalks<S>& walks) {
  std::atomic<int> worst{static_cast<int>(RunsResult::done)};
  parallel_for(0, args.count, kRowsPerTask, [&](int64_t begin, int64_t end) {
    const int result = static_cast<int>(walks.runs(args, begin, end));
    int seen = worst;
    while (result > seen && !worst.compare_exchange_weak(seen, result)) continue;
  });
  switch (static_cast<RunsResult>(worst.load())) {
    case RunsResult::done: return true;
    case RunsResult::not_finite: return false;
    case RunsResult::not_ascending: break;
  }
  return walks.scattered(args);
}

// The first reward that the rule does not accept.
template <class S> GroupFault find_reward(const GroupArgs<S>& args) {
  const bool nan = args.nan != NanRule::error;
  bool suspect = false;
  for (int64_t i = 0; i < args.count * args.columns; i++) suspect |= !(args.rewards[i] - args.rewards[i] == 0);
  if (!suspect) return {};
  for (int64_t i = 0; i < args.count * args.columns; i++)
    if (!std::isfinite(args.rewards[i]) && !(nan && std::isnan(args.rewards[i]))) return {GroupFault::reward, i};
  return {};  // finite doubles whose sum overflows: the group is NaN
}

// The first row of the first group of several rows without a token.
template <class S> GroupFault find_no_tokens(const GroupArgs<S>& args, const GroupIndex& index) {
  for (int64_t g = 0; g < index.groups(); g++) {
    int64_t tokens = 0;
    for (int64_t i = index.offsets[g]; i < index.offsets[g + 1]; i++) tokens += args.lengths[index.order[i]];
    if (tokens == 0 && index.offsets[g + 1] - index.offsets[g] > 1)
      return {GroupFault::no_tokens, index.order[index.offsets[g]]};
  }
  return {GroupFault::no_tokens, 0};
}

template <class S> GroupFault run_batch(const GroupArgs<S>& args, const GroupStatsWalks<S>& walks) {
  // Parts of a fixed size, merged in order: the same bits on any number of threads.
  std::vector<Moments> parts(ceil_div(args.count, kRowsPerPart));
  parallel_for(0, static_cast<int64_t>(parts.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      parts[p] = walks.batch_moments(args, p * kRowsPerPart, std::min(args.count, (p + 1) * kRowsPerPart));
  });
  Moments all;
  for (const Moments& part : parts) all = merge(all, part);
  if (args.batch == BatchRule::token && all.n < 2) return {GroupFault::few_tokens, static_cast<int64_t>(all.n)};
  const Affine f = batch_affine(args.batch, all, args.batch_eps);
  parallel_for(0, args.count, kRowsPerTask, [&](int64_t begin, int64_t end) { walks.batch_results(args, f, begin, end); });
  return {};
}

template <class S> GroupFault run(const GroupArgs<S>& args, const GroupStatsWalks<S>& walks) {
  if (args.count == 0) return {};
  if (plain_rule(args)) {
    if (run_plain(args, walks)) return {};
    if (args.nan == NanRule::error) return find_reward(args);
  }
  if (const GroupFault fault = find_reward(args); fault.kind != GroupFault::none) return fault;
  if (args.lengths)
    for (int64_t i = 0; i < args.count; i++)
      if (args.lengths[i] < 0) return {GroupFault::length, i};
  const GroupIndex index = group_index(args.group, args.count);
  std::atomic<bool> no_tokens{false};
  parallel_for(0, index.groups(), kGroupsPerTask, [&](int64_t begin, int64_t end) {
    if (!walks.listed(args, index.order.data(), index.offsets.data(), begin, end)) no_tokens = true;
  });
  if (no_tokens) return find_no_tokens(args, index);
  return args.batch == BatchRule::none ? GroupFault{} : run_batch(args, walks);
}

}  // namespace

GroupFault cpu_group_advantages(const GroupArgs<float>& args) { return run(args, group_stats_cpu().f32); }
GroupFault cpu_group_advantages(const GroupArgs<double>& args) { return run(args, group_stats_cpu().f64); }

}  // namespace prefkern
