// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "sampling/beta_thompson.h"
#include "sampling/budget.h"
#include "sampling/seeded_normal.h"

namespace prefkern {

template <class S> void bind_normal_structs(py::module_& m, const std::string& suffix) {
  using Args = NormalArgs<S>;
  Struct<Args> s(m, "NormalArgs" + suffix);
  s.member("seed", &Args::seed)
      .member("first_row", &Args::first_row)
      .member("rows", &Args::rows)
      .member("scale", &Args::scale)
      .member("first_element", &Args::first_element)
      .member("count", &Args::count)
      .member("dtype", &Args::dtype);
  s.member("weights", &Args::weights);
  s.member("add_to", &Args::add_to);
  s.member("out", &Args::out);
}

template <class S> void bind_thompson_structs(py::module_& m, const std::string& suffix) {
  using Args = ThompsonArgs<S>;
  Struct<Args> t(m, "ThompsonArgs" + suffix);
  t.member("count", &Args::count).member("k", &Args::k).member("utility", &Args::utility).member("mode", &Args::mode);
  t.member("seed", &Args::seed).member("step", &Args::step);
  t.member("alpha", &Args::alpha).member("beta", &Args::beta).member("eligible", &Args::eligible);
  t.member("draws", &Args::draws).member("utilities", &Args::utilities);
  t.member("ids", &Args::ids).member("top", &Args::top).member("found", &Args::found);

  using Update = BetaUpdateArgs<S>;
  Struct<Update> u(m, "BetaUpdateArgs" + suffix);
  u.member("count", &Update::count).member("selected", &Update::selected);
  u.member("alpha", &Update::alpha).member("beta", &Update::beta).member("ids", &Update::ids).member("order", &Update::order);
  u.member("successes", &Update::successes).member("rollouts", &Update::rollouts);
  u.member("lam1", &Update::lam1).member("lam2", &Update::lam2).member("scratch", &Update::scratch);
}

inline void bind_sampling(py::module_& m) {
  bind_normal_structs<float>(m, "");
  bind_normal_structs<double>(m, "64");
  Struct<PhiloxArgs> p(m, "PhiloxArgs");
  p.member("seed", &PhiloxArgs::seed)
      .member("row", &PhiloxArgs::row)
      .member("first_block", &PhiloxArgs::first_block)
      .member("blocks", &PhiloxArgs::blocks);
  p.member("words", &PhiloxArgs::words);
  py::enum_<ThompsonUtility>(m, "ThompsonUtility").value("p1mp2", ThompsonUtility::p1mp2).value("p1mp", ThompsonUtility::p1mp);
  py::enum_<ThompsonMode>(m, "ThompsonMode").value("thompson", ThompsonMode::thompson).value("mean", ThompsonMode::mean);
  py::enum_<BudgetMethod>(m, "BudgetMethod").value("exact", BudgetMethod::exact).value("greedy", BudgetMethod::greedy);
  bind_thompson_structs<float>(m, "");
  bind_thompson_structs<double>(m, "64");
  Struct<BudgetArgs> b(m, "BudgetArgs");
  b.member("method", &BudgetArgs::method).member("prompts", &BudgetArgs::prompts).member("choices", &BudgetArgs::choices);
  b.member("surplus", &BudgetArgs::surplus).member("utilities", &BudgetArgs::utilities).member("extra", &BudgetArgs::extra);
}

inline void bind_sampling_cpu(py::module_& m) {
  bind_cpu<void, NormalArgs<float>>(m, "cpu_seeded_normal", &cpu_seeded_normal);
  bind_cpu<void, NormalArgs<double>>(m, "cpu_seeded_normal64", &cpu_seeded_normal);
  bind_cpu<void, PhiloxArgs>(m, "cpu_philox_words", &cpu_philox_words);
  bind_cpu<void, ThompsonArgs<float>>(m, "cpu_beta_thompson", &cpu_beta_thompson);
  bind_cpu<void, ThompsonArgs<double>>(m, "cpu_beta_thompson64", &cpu_beta_thompson);
  bind_cpu<void, BetaUpdateArgs<float>>(m, "cpu_beta_update", &cpu_beta_update);
  bind_cpu<void, BetaUpdateArgs<double>>(m, "cpu_beta_update64", &cpu_beta_update);
  bind_cpu<void, BudgetArgs>(m, "cpu_allocate_budget", &cpu_allocate_budget);
}

inline void bind_sampling_cuda(py::module_& m) {
  bind_cuda(m, "cuda_seeded_normal", &cuda_seeded_normal);
  bind_cuda(m, "cuda_philox_words", &cuda_philox_words);
  bind_cuda(m, "cuda_beta_thompson", &cuda_beta_thompson);
  bind_cuda(m, "cuda_beta_update", &cuda_beta_update);
}

}  // namespace prefkern
