// The CUDA entry points of a build without a CUDA compiler: they report it, so that a CUDA tensor gets a clear error.
#if defined(PREFKERN_NO_CUDA)
#include "advantages/group_stats.h"
#include "core/cuda_runtime.h"
#include "logprobs/logits_fold.h"
#include "policy/importance.h"
#include "policy/token_loss.h"

namespace prefkern {
const char* cuda_architectures() { return ""; }
int cuda_runtime_version() { return 0; }
const char* cuda_error_string(int) {
  return "prefkern was built without CUDA; install nvcc and rebuild, or move the tensors to the CPU";
}
int cuda_fold_logits(const FoldArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_grad_logits(const GradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_group_advantages(const GroupArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_policy_loss(const PolicyArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_policy_loss_backward(const PolicyGradArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_importance_weights(const WeightArgs<float>&, void*) { return kBuiltWithoutCuda; }
int cuda_off_policy_mask(const OffPolicyArgs<float>&, void*) { return kBuiltWithoutCuda; }
}  // namespace prefkern
#endif
