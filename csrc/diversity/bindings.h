// The argument structs and launchers of this room for Python.
#pragma once
#include <string>

#include "core/bindings.h"
#include "diversity/edit_distance.h"
#include "diversity/greedy_select.h"
#include "diversity/ngrams.h"

namespace prefkern {

template <class T> void bind_prompt_structs(py::module_& m, const std::string& suffix) {
  using Prompts = PromptArgs<T>;
  Struct<Prompts> p(m, "PromptArgs" + suffix);
  p.member("layout", &Prompts::layout).member("prompts", &Prompts::prompts).member("cu_prompts", &Prompts::cu_prompts);
  p.member("ids", &Prompts::ids).member("mask", &Prompts::mask).member("result", &Prompts::result);

  using Bleu = SelfBleuArgs<T>;
  Struct<Bleu> b(m, "SelfBleuArgs" + suffix);
  b.member("of", &Bleu::of).member("orders", &Bleu::orders);
  b.member("weights", &Bleu::weights).member("smoothing", &Bleu::smoothing);

  using Distinct = DistinctArgs<T>;
  Struct<Distinct> d(m, "DistinctArgs" + suffix);
  d.member("of", &Distinct::of).member("n", &Distinct::n);

  using Edit = EditArgs<T>;
  Struct<Edit> e(m, "EditArgs" + suffix);
  e.member("of", &Edit::of).member("normalize", &Edit::normalize);
}

template <class S> void bind_greedy_structs(py::module_& m, const std::string& suffix) {
  using Greedy = GreedyArgs<S>;
  Struct<Greedy> g(m, "GreedyArgs" + suffix);
  g.member("seeds", &Greedy::seeds).member("candidates", &Greedy::candidates).member("width", &Greedy::width);
  g.member("types", &Greedy::types).member("size", &Greedy::size);
  g.member("maximum", &Greedy::maximum).member("dtype", &Greedy::dtype);
  g.member("own_embeddings", &Greedy::own_embeddings).member("own_types", &Greedy::own_types);
  g.member("own_quotas", &Greedy::own_quotas);
  g.member("embeddings", &Greedy::embeddings);
  g.member("type_id", &Greedy::type_id).member("seed", &Greedy::seed).member("quotas", &Greedy::quotas);
  g.member("inverse_norms", &Greedy::inverse_norms).member("scores", &Greedy::scores).member("chosen", &Greedy::chosen);
}

inline void bind_diversity(py::module_& m) {
  bind_prompt_structs<int64_t>(m, "");
  bind_prompt_structs<int32_t>(m, "32");
  bind_greedy_structs<float>(m, "");
  bind_greedy_structs<double>(m, "64");
}

inline void bind_diversity_cpu(py::module_& m) {
  bind_cpu<void, SelfBleuArgs<int64_t>>(m, "cpu_self_bleu", &cpu_self_bleu);
  bind_cpu<void, SelfBleuArgs<int32_t>>(m, "cpu_self_bleu32", &cpu_self_bleu);
  bind_cpu<void, DistinctArgs<int64_t>>(m, "cpu_distinct_n", &cpu_distinct_n);
  bind_cpu<void, DistinctArgs<int32_t>>(m, "cpu_distinct_n32", &cpu_distinct_n);
  bind_cpu<void, EditArgs<int64_t>>(m, "cpu_edit_distance", &cpu_edit_distance);
  bind_cpu<void, EditArgs<int32_t>>(m, "cpu_edit_distance32", &cpu_edit_distance);
  bind_cpu<void, GreedyArgs<float>>(m, "cpu_greedy_norms", &cpu_greedy_norms);
  bind_cpu<void, GreedyArgs<double>>(m, "cpu_greedy_norms64", &cpu_greedy_norms);
  bind_cpu<void, GreedyArgs<float>>(m, "cpu_greedy_select", &cpu_greedy_select);
  bind_cpu<void, GreedyArgs<double>>(m, "cpu_greedy_select64", &cpu_greedy_select);
}

inline void bind_diversity_cuda(py::module_& m) { bind_cuda(m, "cuda_greedy_select", &cuda_greedy_select); }

}  // namespace prefkern
