// first_divergence: the length of the common prefix of each pair of sequences, padded or packed.
#include "conflicts/divergence.h"
#include "conflicts/ops.h"
#include "core/arguments.h"

namespace prefkern {
namespace {

// One of the two sides, checked and contiguous.
struct Side {
  Tensor ids;
  OptTensor mask, cu_seqlens;
  SequenceLayout layout;

  Side(const Tensor& t, const char* name, const OptTensor& m, const char* mask_name, const OptTensor& cu, const char* cu_name)
      : ids(to_contiguous(t)) {
    check_type(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, name, " has dtype ",
               dtype_name(t.scalar_type()), "; accepted: int64, int32");
    mask = checked_mask(m, t, name, mask_name);
    if (cu) cu_seqlens = to_contiguous(*cu);
    layout = checked_layout(t, name, cu_seqlens, cu_name);
  }
};

template <class T> void run(const Side& a, const Side& b, const Tensor& position) {
  DivergenceArgs<T> args;
  args.layout_a = a.layout;
  args.layout_b = b.layout;
  args.ids_a = data<T>(a.ids);
  args.ids_b = data<T>(b.ids);
  args.mask_a = data_or_null<uint8_t>(a.mask);
  args.mask_b = data_or_null<uint8_t>(b.mask);
  args.position = mutable_data<int64_t>(position);
  if (position.is_cuda()) return check_cuda(cuda_first_divergence(args, current_stream(position)));
  const int64_t bad = cpu_first_divergence(args);
  check_value(bad < 0, bad % 2 ? "mask_b" : "mask_a", " of row ", bad / 2,
              " has a token that counts behind one that does not; accepted: a run of True from the first token on");
}

}  // namespace

Tensor first_divergence(const Tensor& ids_a, const Tensor& ids_b, OptTensor mask_a, OptTensor mask_b, OptTensor cu_seqlens_a,
                        OptTensor cu_seqlens_b) {
  const OnDevice guard(ids_a);
  check_same_device(ids_b, "ids_b", ids_a, "ids_a");
  const Side a(ids_a, "ids_a", mask_a, "mask_a", cu_seqlens_a, "cu_seqlens_a");
  const Side b(ids_b, "ids_b", mask_b, "mask_b", cu_seqlens_b, "cu_seqlens_b");
  check_type(ids_b.scalar_type() == ids_a.scalar_type(), "ids_b has dtype ", dtype_name(ids_b.scalar_type()),
             "; that of ids_a, ", dtype_name(ids_a.scalar_type()), ", is expected");
  check_value(a.layout.sequences == b.layout.sequences, "ids_b has ", b.layout.sequences, " sequences; ids_a has ",
              a.layout.sequences, ", so as many are expected");
  const Tensor position = empty({a.layout.sequences}, ScalarType::Long, ids_a);
  ids_a.scalar_type() == ScalarType::Long ? run<int64_t>(a, b, position) : run<int32_t>(a, b, position);
  return position;
}

}  // namespace prefkern
