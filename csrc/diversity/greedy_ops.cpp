// greedy_select: sets of candidates that are unlike each other.
#include <vector>

#include "core/arguments.h"
#include "diversity/greedy_select.h"
#include "diversity/ops.h"

namespace prefkern {
namespace {

// Integers, `columns` of them, for all seeds or for each, as contiguous int64.
Tensor checked_columns(const Tensor& t, const char* name, const Tensor& emb, int64_t seeds, int64_t columns,
                       const char* columns_name) {
  check_type(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, name, " has dtype ",
             dtype_name(t.scalar_type()), "; accepted: int64, int32");
  check_same_device(t, name, emb, "emb");
  const bool shared = t.dim() == 1 && t.size(0) == columns, own = t.dim() == 2 && t.size(0) == seeds && t.size(1) == columns;
  check_value(shared || own, name, " has shape ", shape_text(t), "; [", columns, "], or [", seeds, ", ", columns,
              "], is expected: ", columns_name);
  return to_contiguous(cast(t, ScalarType::Long));
}

// What the kernel takes for granted on the CPU.
template <class S> void check_sets(const GreedyArgs<S>& a) {
  std::vector<int64_t> there(a.types);
  for (int64_t q = 0; q < a.seeds; q++) {
    const int64_t* types = a.type_id + (a.own_types ? q * a.candidates : 0);
    const int64_t *quotas = a.quotas + (a.own_quotas ? q * a.types : 0), seed = a.seed[q];
    check_value(seed >= 0 && seed < a.candidates, "seeds[", q, "] is ", seed, "; accepted: 0 to ", a.candidates - 1);
    if (q == 0 || a.own_types) {
      there.assign(a.types, 0);
      for (int64_t i = 0; i < a.candidates; i++) {
        check_value(types[i] >= 0 && types[i] < a.types, "type_id of candidate ", i, " of seed ", q, " is ", types[i],
                    "; quotas has ", a.types, " types, so 0 to ", a.types - 1, " are accepted");
        there[types[i]]++;
      }
    }
    int64_t total = 0;
    for (int64_t c = 0; c < a.types; c++) {
      check_value(quotas[c] >= 0, "quotas of seed ", q, " is ", quotas[c], " for type ", c, "; it must not be negative");
      check_value(quotas[c] <= there[c], "quotas of seed ", q, " asks for ", quotas[c], " candidates of type ", c,
                  "; there are ", there[c]);
      total += quotas[c];
    }
    check_value(quotas[types[seed]] > 0, "quotas of seed ", q, " is 0 for type ", types[seed],
                ", which the seed is of; the seed counts as one");
    check_value(total <= a.size, "size is ", a.size, "; quotas of seed ", q, " ask for ", total);
  }
}

template <class S> void check_norms(const GreedyArgs<S>& a) {
  for (int64_t row = 0; row < (a.own_embeddings ? a.seeds : 1) * a.candidates; row++)
    if (!(a.inverse_norms[row] > 0)) {
      const int64_t q = row / a.candidates, i = row % a.candidates;
      a.own_embeddings ? fail("ValueError", "emb[", q, ", ", i, "] has no cosine: its norm is not in [1e-30, 1e30]")
                       : fail("ValueError", "emb[", i, "] has no cosine: its norm is not in [1e-30, 1e30]");
    }
}

}  // namespace

Tensor greedy_select(const Tensor& emb, const Tensor& type_id, const Tensor& seeds, const Tensor& quotas, int64_t size,
                     bool maximum) {
  const DType dtype = float_dtype(emb, "emb");
  check_value(emb.dim() == 2 || emb.dim() == 3, "emb has shape ", shape_text(emb), "; expected [K, d], or [Q, K, d]");
  check_type(seeds.scalar_type() == ScalarType::Long || seeds.scalar_type() == ScalarType::Int, "seeds has dtype ",
             dtype_name(seeds.scalar_type()), "; accepted: int64, int32");
  check_value(seeds.dim() == 1, "seeds has shape ", shape_text(seeds), "; expected [Q]");
  check_same_device(seeds, "seeds", emb, "emb");
  const bool own = emb.dim() == 3;
  const int64_t q = seeds.size(0), k = emb.size(own), d = emb.size(own + 1);
  check_value(!own || emb.size(0) == q, "emb has shape ", shape_text(emb), "; seeds has ", q, ", so [", q,
              ", K, d] is expected");
  check_value(k > 0 && k < int64_t(1) << 32 && d > 0, "emb has shape ", shape_text(emb),
              "; candidates (fewer than 2^32) and features are expected");
  check_value(quotas.dim() > 0 && quotas.size(quotas.dim() - 1) > 0 && quotas.size(quotas.dim() - 1) <= kMostTypes,
              "quotas has shape ", shape_text(quotas), "; expected [C], or [Q, C], of 1 to ", kMostTypes, " types");
  check_value(size >= 0, "size is ", size, "; it must not be negative");
  const int64_t c = quotas.size(quotas.dim() - 1);
  const OnDevice guard(emb);
  const Tensor types = checked_columns(type_id, "type_id", emb, q, k, "one for each candidate");
  const Tensor asked = checked_columns(quotas, "quotas", emb, q, c, "one for each type");
  const Tensor x = to_contiguous(emb), from = to_contiguous(cast(seeds, ScalarType::Long));
  const ScalarType real = dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  const Tensor chosen = empty({q, size}, ScalarType::Long, emb), scores = empty({q, k}, real, emb);
  const Tensor norms = empty({own ? q : 1, k}, real, emb);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.scores)>;
    a.seeds = q, a.candidates = k, a.width = d, a.types = c, a.size = size;
    a.maximum = maximum;
    a.dtype = dtype;
    a.own_embeddings = own, a.own_types = types.dim() == 2, a.own_quotas = asked.dim() == 2;
    a.embeddings = x.const_data_ptr();
    a.type_id = data<int64_t>(types);
    a.seed = data<int64_t>(from);
    a.quotas = data<int64_t>(asked);
    a.inverse_norms = mutable_data<S>(norms);
    a.scores = mutable_data<S>(scores);
    a.chosen = mutable_data<int64_t>(chosen);
    return a;
  };
  const auto on_cpu = [&](const auto& a) {
    check_sets(a);
    cpu_greedy_norms(a);
    check_norms(a);
    cpu_greedy_select(a);
  };
  if (dtype == DType::f64) on_cpu(filled(GreedyArgs<double>()));
  else if (emb.is_cuda()) check_cuda(cuda_greedy_select(filled(GreedyArgs<float>()), current_stream(emb)));
  else on_cpu(filled(GreedyArgs<float>()));
  return chosen;
}

}  // namespace prefkern
