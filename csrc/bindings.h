// Argument structs and launchers for Python: used by module.cpp, and by tests/simt, which offers the same launchers over
// CUDA kernels that run on the CPU. Pointers are plain integers (tensor.data_ptr(), array.ctypes.data); nothing is
// checked, nothing is kept alive.
#pragma once
#include "advantages/bindings.h"
#include "conflicts/bindings.h"
#include "core/bindings.h"
#include "diversity/bindings.h"
#include "diffusion/bindings.h"
#include "filters/bindings.h"
#include "gaussian/bindings.h"
#include "groups/bindings.h"
#include "lists/bindings.h"
#include "logprobs/bindings.h"
#include "meta/bindings.h"
#include "policy/bindings.h"
#include "preference/bindings.h"
#include "sampling/bindings.h"
#include "sequence/bindings.h"

namespace prefkern {

inline void bind_argument_structs(py::module_& m) {
  bind_core(m);
  bind_logprobs(m);
  bind_advantages(m);
  bind_policy(m);
  bind_preference(m);
  bind_sequence(m);
  bind_groups(m);
  bind_conflicts(m);
  bind_filters(m);
  bind_gaussian(m);
  bind_lists(m);
  bind_sampling(m);
  bind_diversity(m);
  bind_meta(m);
  bind_diffusion(m);
}

inline void bind_cpu_launchers(py::module_& m) {
  bind_core_cpu(m);
  bind_logprobs_cpu(m);
  bind_advantages_cpu(m);
  bind_policy_cpu(m);
  bind_preference_cpu(m);
  bind_sequence_cpu(m);
  bind_groups_cpu(m);
  bind_conflicts_cpu(m);
  bind_filters_cpu(m);
  bind_gaussian_cpu(m);
  bind_lists_cpu(m);
  bind_sampling_cpu(m);
  bind_diversity_cpu(m);
  bind_meta_cpu(m);
  bind_diffusion_cpu(m);
}

inline void bind_cuda_launchers(py::module_& m) {
  bind_logprobs_cuda(m);
  bind_advantages_cuda(m);
  bind_policy_cuda(m);
  bind_preference_cuda(m);
  bind_sequence_cuda(m);
  bind_groups_cuda(m);
  bind_conflicts_cuda(m);
  bind_filters_cuda(m);
  bind_gaussian_cuda(m);
  bind_lists_cuda(m);
  bind_sampling_cuda(m);
  bind_diversity_cuda(m);
  bind_meta_cuda(m);
  bind_diffusion_cuda(m);
}

}  // namespace prefkern
