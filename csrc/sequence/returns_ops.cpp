// discounted_returns, segmented_returns and gae: constants in, constants out.
#include <type_traits>

#include "core/arguments.h"
#include "sequence/ops.h"
#include "sequence/returns.h"

namespace prefkern {
namespace {

void check_factor(double value, const char* name) {
  check_value(value >= 0 && value <= 1, name, " is ", value, "; it must lie in [0, 1]");
}

Tensor empty_like_tokens(const Tensor& tokens, ScalarType st) {
  return tokens.dim() == 2 ? empty({tokens.size(0), tokens.size(1)}, st, tokens) : empty({tokens.size(0)}, st, tokens);
}

SequenceLayout returns_layout(const Tensor& rewards, OptTensor& cu_seqlens) {
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const SequenceLayout layout = checked_layout(rewards, "rewards", cu_seqlens);
  check_value(layout.sequences > 0 || layout.tokens == 0, "cu_seqlens has no sequence; rewards has ", layout.tokens, " tokens");
  return layout;
}

// A tensor with one element per sequence.
void check_per_sequence(const Tensor& t, const char* name, const Tensor& rewards, int64_t sequences) {
  check_same_device(t, name, rewards, "rewards");
  check_value(t.dim() == 1 && t.size(0) == sequences, name, " has shape ", shape_text(t), "; expected [", sequences,
              "] (one per sequence)");
}

template <class S> void launch(const ReturnsArgs<S>& a, const Tensor& rewards) {
  if constexpr (std::is_same_v<S, float>)
    if (rewards.is_cuda()) return check_cuda(cuda_returns(a, current_stream(rewards)));
  cpu_returns(a);
}

template <class S> SegmentedArgs<S> segmented_args(const Tensor& rewards, double gamma, const Tensor& out) {
  SegmentedArgs<S> a;
  a.gamma = gamma;
  a.count = rewards.size(0);
  a.rewards = data<S>(rewards);
  a.returns = mutable_data<S>(out);
  return a;
}

template <class S>
void run_cpu(const Tensor& rewards, const Tensor& segment, const Tensor& places, double gamma, const Tensor& out) {
  SegmentedArgs<S> a = segmented_args<S>(rewards, gamma, out);
  a.segment = data<int64_t>(segment);
  a.place = data<int64_t>(places);
  const int64_t twice = cpu_segmented_returns(a);
  check_value(twice < 0, "order[", twice, "] is ", twice < 0 ? 0 : a.place[twice],
              ", as in another row of its segment; every row of a segment needs a place of its own");
}

}  // namespace

Tensor discounted_returns(const Tensor& rewards, OptTensor mask, OptTensor cu_seqlens, double gamma) {
  const DType acc = accumulator(float_dtype(rewards, "rewards"));
  check_factor(gamma, "gamma");
  const OnDevice guard(rewards);
  const SequenceLayout layout = returns_layout(rewards, cu_seqlens);
  mask = checked_mask(mask, rewards, "rewards");
  const ScalarType st = scalar_type(acc);
  const Tensor r = to_contiguous(cast(rewards, st)), out = empty_like_tokens(rewards, st);
  const auto run = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.advantages)>;
    a.rule.gamma = a.rule.decay = gamma;
    a.layout = layout;
    a.rewards = data<S>(r);
    a.mask = data_or_null<uint8_t>(mask);
    a.advantages = mutable_data<S>(out);
    launch(a, r);
  };
  acc == DType::f64 ? run(ReturnsArgs<double>()) : run(ReturnsArgs<float>());
  return out;
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, OptTensor mask, OptTensor lengths,
                               OptTensor cu_seqlens, OptTensor finished, OptTensor last_values, double gamma, double lam,
                               int64_t bootstrap) {
  const DType acc = accumulator(float_dtype(rewards, "rewards"));
  check_factor(gamma, "gamma");
  check_factor(lam, "lam");
  check_value(bootstrap >= 0 && bootstrap <= 2, "bootstrap is ", bootstrap, "; accepted: 0 to 2");
  const bool critic = static_cast<Bootstrap>(bootstrap) == Bootstrap::critic;
  check_value(critic == last_values.has_value(), critic ? "last_values is None; bootstrap 'critic' needs it"
                                                        : "last_values is given; it belongs to bootstrap 'critic' only");
  const OnDevice guard(rewards);
  const SequenceLayout layout = returns_layout(rewards, cu_seqlens);
  const ScalarType st = scalar_type(acc);
  const Tensor r = to_contiguous(cast(rewards, st)), v = checked_tokens(values, "values", rewards, "rewards", st);
  mask = checked_mask(mask, rewards, "rewards");
  if (lengths) {
    check_value(!mask && !cu_seqlens, "lengths is given with ", mask ? "a mask" : "cu_seqlens",
                "; it says how many tokens of padded sequences count, in place of a mask");
    lengths = checked_ids(*lengths, "lengths", rewards, "rewards");
    if (lengths->is_cpu()) {
      const int64_t* l = data<int64_t>(*lengths);
      for (int64_t b = 0; b < layout.sequences; b++)
        check_value(l[b] >= 0 && l[b] <= layout.padded_length, "lengths[", b, "] is ", l[b], "; it must lie in [0, ",
                    layout.padded_length, "]");
    }
  }
  if (finished) {
    check_type(finished->scalar_type() == ScalarType::Bool, "finished has dtype ", dtype_name(finished->scalar_type()),
               "; accepted: bool");
    check_per_sequence(*finished, "finished", rewards, layout.sequences);
    finished = to_contiguous(*finished);
  }
  if (last_values) {
    float_dtype(*last_values, "last_values");
    check_per_sequence(*last_values, "last_values", rewards, layout.sequences);
    last_values = to_contiguous(cast(*last_values, st));
  }
  const std::tuple<Tensor, Tensor> out{empty_like_tokens(rewards, st), empty_like_tokens(rewards, st)};
  const auto run = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.advantages)>;
    a.rule = {static_cast<Bootstrap>(bootstrap), gamma, gamma * lam};
    a.layout = layout;
    a.rewards = data<S>(r);
    a.values = data<S>(v);
    a.mask = data_or_null<uint8_t>(mask);
    a.lengths = data_or_null<int64_t>(lengths);
    a.finished = data_or_null<uint8_t>(finished);
    a.last_values = data_or_null<S>(last_values);
    a.advantages = mutable_data<S>(std::get<0>(out));
    a.returns = mutable_data<S>(std::get<1>(out));
    launch(a, r);
  };
  acc == DType::f64 ? run(ReturnsArgs<double>()) : run(ReturnsArgs<float>());
  return out;
}

Tensor segmented_returns(const Tensor& rewards, const Tensor& segment, const Tensor& order, double gamma) {
  const DType acc = accumulator(float_dtype(rewards, "rewards"));
  check_value(rewards.dim() == 1, "rewards has shape ", shape_text(rewards), "; expected [B]");
  check_factor(gamma, "gamma");
  const OnDevice guard(rewards);
  const Tensor ids = checked_ids(segment, "segment", rewards, "rewards");
  const Tensor places = checked_ids(order, "order", rewards, "rewards");
  const ScalarType st = scalar_type(acc);
  const Tensor r = to_contiguous(cast(rewards, st)), out = empty({rewards.size(0)}, st, rewards);
  if (r.is_cuda() && r.size(0) > 0) {
    // By place first; the second sort is stable, so that places ascend within a segment.
    const auto [sorted_places, by_place] = sort_ids(places);
    const auto [sorted_ids, by_segment] = sort_ids(index_rows(ids, by_place));
    const Tensor place = index_rows(sorted_places, by_segment), rows = index_rows(by_place, by_segment);
    SegmentedArgs<float> a = segmented_args<float>(r, gamma, out);
    a.segment = data<int64_t>(sorted_ids);
    a.place = data<int64_t>(place);
    a.rows = data<int64_t>(rows);
    check_cuda(cuda_segmented_returns(a, current_stream(r)));
  } else if (acc == DType::f64) {
    run_cpu<double>(r, ids, places, gamma, out);
  } else {
    run_cpu<float>(r, ids, places, gamma, out);
  }
  return out;
}

}  // namespace prefkern
