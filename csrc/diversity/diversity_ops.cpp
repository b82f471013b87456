// self_bleu, distinct_n, edit_distance: how much the responses to each prompt differ. On the CPU alone.
#include <cmath>

#include "core/arguments.h"
#include "diversity/edit_distance.h"
#include "diversity/ngrams.h"
#include "diversity/ops.h"

namespace prefkern {
namespace {

// Responses and where they are, checked.
struct Responses {
  Tensor ids;
  OptTensor mask, cu_seqlens, cu_prompts;
  SequenceLayout layout;
  int64_t prompts = 1;
  Tensor result;

  Responses(const Tensor& t, const OptTensor& m, const OptTensor& cu, const OptTensor& cu_of_prompts)
      : ids(checked(t)), mask(checked_mask(m, t, "ids")), result(t) {
    if (cu) cu_seqlens = to_contiguous(*cu);
    layout = checked_layout(t, "ids", cu_seqlens);
    if (cu_of_prompts) set_prompts(*cu_of_prompts);
    check_value(layout.tokens < int64_t(1) << 32, "ids has ", layout.tokens, " tokens; fewer than 2^32 are expected");
    result = empty({prompts}, ScalarType::Double, t);
  }

  template <class T> PromptArgs<T> args() const {
    PromptArgs<T> a;
    a.layout = layout;
    a.prompts = prompts;
    a.cu_prompts = data_or_null<int32_t>(cu_prompts);
    a.ids = data<T>(ids);
    a.mask = data_or_null<uint8_t>(mask);
    a.result = mutable_data<double>(result);
    return a;
  }

 private:
  static Tensor checked(const Tensor& t) {
    check_value(t.is_cpu(), "ids is on ", device_text(t), "; n-grams and edits are counted on the CPU: ids.cpu() is expected");
    check_type(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, "ids has dtype ",
               dtype_name(t.scalar_type()), "; accepted: int64, int32");
    return to_contiguous(t);
  }

  void set_prompts(const Tensor& t) {
    check_type(t.scalar_type() == ScalarType::Int, "cu_prompts has dtype ", dtype_name(t.scalar_type()), "; accepted: int32");
    check_value(t.dim() == 1 && t.size(0) > 0, "cu_prompts has shape ", shape_text(t), "; expected [P + 1]");
    check_same_device(t, "cu_prompts", ids, "ids");
    cu_prompts = to_contiguous(t);
    prompts = t.size(0) - 1;
    const int32_t* c = data<int32_t>(*cu_prompts);
    check_value(c[0] == 0, "cu_prompts[0] is ", c[0], "; it must be 0");
    for (int64_t p = 0; p < prompts; p++)
      check_value(c[p] <= c[p + 1], "cu_prompts[", p + 1, "] is ", c[p + 1], " after ", c[p], "; it must not descend");
    check_value(c[prompts] == layout.sequences, "cu_prompts ends at ", c[prompts], "; ids has ", layout.sequences,
                " responses, so that is expected");
  }
};

template <class F> Tensor run(const Responses& r, const F& f) {
  r.ids.scalar_type() == ScalarType::Long ? f(r.args<int64_t>()) : f(r.args<int32_t>());
  return r.result;
}

}  // namespace

Tensor self_bleu(const Tensor& ids, OptTensor mask, OptTensor cu_seqlens, OptTensor cu_prompts, const Tensor& weights,
                 double smoothing) {
  check_type(weights.scalar_type() == ScalarType::Double && weights.is_cpu(), "weights is ", dtype_name(weights.scalar_type()),
             " on ", device_text(weights), "; float64 on the CPU is expected");
  check_value(weights.dim() == 1 && weights.size(0) > 0, "weights has shape ", shape_text(weights),
              "; one for each order from 1 on is expected");
  const Tensor w = to_contiguous(weights);
  for (int64_t n = 0; n < w.size(0); n++)
    check_value(std::isfinite(data<double>(w)[n]) && data<double>(w)[n] >= 0, "weights[", n, "] is ", data<double>(w)[n],
                "; it must be finite and not negative");
  check_value(std::isfinite(smoothing) && smoothing >= 0, "smoothing is ", smoothing, "; it must be finite and not negative");
  return run(Responses(ids, mask, cu_seqlens, cu_prompts), [&](const auto& of) {
    SelfBleuArgs<std::remove_const_t<std::remove_pointer_t<decltype(of.ids)>>> a;
    a.of = of;
    a.orders = w.size(0);
    a.weights = data<double>(w);
    a.smoothing = smoothing;
    cpu_self_bleu(a);
  });
}

Tensor distinct_n(const Tensor& ids, OptTensor mask, OptTensor cu_seqlens, OptTensor cu_prompts, int64_t n) {
  check_value(n > 0, "n is ", n, "; it must be positive");
  return run(Responses(ids, mask, cu_seqlens, cu_prompts), [&](const auto& of) {
    DistinctArgs<std::remove_const_t<std::remove_pointer_t<decltype(of.ids)>>> a;
    a.of = of;
    a.n = n;
    cpu_distinct_n(a);
  });
}

Tensor edit_distance(const Tensor& ids, OptTensor mask, OptTensor cu_seqlens, OptTensor cu_prompts, bool normalize) {
  return run(Responses(ids, mask, cu_seqlens, cu_prompts), [&](const auto& of) {
    EditArgs<std::remove_const_t<std::remove_pointer_t<decltype(of.ids)>>> a;
    a.of = of;
    a.normalize = normalize;
    cpu_edit_distance(a);
  });
}

}  // namespace prefkern
