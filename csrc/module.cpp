// prefkern._C: what does not go through the dispatcher. Every kernel's launcher by raw pointer, sizes and stream, the
// chunk planner, and what this binary and this machine are. Importing it loads libprefkern_ops.so, which registers the ops.
#include "bindings.h"

#include <pybind11/stl.h>

#include "core/cuda_runtime.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/plan.h"
#include "core/torch_abi.h"
#include "logprobs/cuda_forward.h"

namespace py = pybind11;
using namespace prefkern;

namespace {

std::string version_text(uint64_t v) {
  return std::to_string(v >> 56) + "." + std::to_string((v >> 48) & 255) + "." + std::to_string((v >> 40) & 255);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict d;
  d["version"] = PREFKERN_VERSION;
  d["compiler"] = __VERSION__;
  d["torch_built"] = version_text(torch_abi_built());
  d["torch_target"] = version_text(torch_abi_target());
  d["torch_running"] = version_text(torch_abi_running());
  d["cuda_archs"] = cuda_architectures();
  d["cuda_runtime"] = cuda_runtime_version();
  d["cutlass"] = cutlass_version();
  return d;
}

py::dict capabilities() {
  py::dict d;
  d["cpu_isa"] = isa_name(cpu_isa());
  d["cpu_gemm"] = own_gemm() ? "own" : "library";
  d["cpu_isas"] = split(compiled_isas());
  d["cpu_features"] = split(detected_features());
  d["cuda_compiled"] = cuda_runtime_version() != 0;
  d["cuda_forward"] = cuda_forward_name(cuda_forward());
  d["cuda_backward"] = cuda_backward_name(cuda_backward());
  d["torch_cuda_stream_api"] = torch_has_cuda_stream();
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "prefkern's kernels by raw pointer, its chunk planner, and what this build and this machine offer";
  m.def("build_info", &build_info, "Versions and compiled-in CUDA architectures.");
  m.def("capabilities", &capabilities, "Instruction set picked, CUDA compiled in or not.");
  m.def(
      "cuda_forward", [] { return cuda_forward_name(cuda_forward()); },
      "Which kernels make the forward of linear_logprobs on CUDA: auto, stage1 or stage2.");
  m.def(
      "set_cuda_forward",
      [](const std::string& name) {
        for (const auto path : {CudaForward::automatic, CudaForward::stage1, CudaForward::stage2})
          if (name == cuda_forward_name(path)) return set_cuda_forward(path);
        throw py::value_error("forward is '" + name + "'; accepted: auto, stage1, stage2");
      },
      py::arg("forward"), "Set that for the calls of this process that follow. Before: PREFKERN_CUDA_FORWARD, or auto.");
  m.def(
      "cuda_backward", [] { return cuda_backward_name(cuda_backward()); },
      "Which rows take part in the backward of linear_logprobs on CUDA: auto, dense (all) or compact (those with a gradient).");
  m.def(
      "set_cuda_backward",
      [](const std::string& name) {
        for (const auto path : {CudaBackward::automatic, CudaBackward::dense, CudaBackward::compact})
          if (name == cuda_backward_name(path)) return set_cuda_backward(path);
        throw py::value_error("backward is '" + name + "'; accepted: auto, dense, compact");
      },
      py::arg("backward"), "Set that for the calls of this process that follow. Before: PREFKERN_CUDA_BACKWARD, or auto.");
  m.def("num_threads", &num_threads, "Threads a kernel may use: torch's own setting.");

  py::class_<ChunkPlan>(m, "ChunkPlan", "How linear_logprobs cuts its work.")
      .def_readonly("row_chunk", &ChunkPlan::row_chunk, "rows of hidden at a time")
      .def_readonly("vocab_block", &ChunkPlan::vocab_block, "vocabulary entries at a time")
      .def_readonly("workspace_bytes", &ChunkPlan::workspace_bytes, "bytes of logits and converted operands held at once")
      .def_readonly("fused", &ChunkPlan::fused, "each thread folds blocks of its own in the epilogue of their product")
      .def("__repr__", [](const ChunkPlan& p) {
        return "ChunkPlan(row_chunk=" + std::to_string(p.row_chunk) + ", vocab_block=" + std::to_string(p.vocab_block) +
               ", workspace_bytes=" + std::to_string(p.workspace_bytes) + ", fused=" + (p.fused ? "True" : "False") + ")";
      });
  m.def(
      "plan_chunks",
      [](int64_t rows, int64_t hidden, int64_t vocab, DType dtype, bool cuda, bool backward, int64_t budget) {
        return plan_chunks({rows, hidden, vocab, dtype, cuda, backward, budget, 0, own_gemm() ? num_threads() : 0});
      },
      py::arg("rows"), py::arg("hidden"), py::arg("vocab"), py::arg("dtype"), py::arg("cuda"), py::arg("backward"),
      py::arg("budget_bytes"));

  m.def(
      "plan_kept",
      [](int64_t rows, int64_t hidden, int64_t vocab, DType dtype, bool cuda, bool backward, int64_t budget, bool weight_grad) {
        return plan_kept({rows, hidden, vocab, dtype, cuda, backward, budget, 0, 0, weight_grad});
      },
      py::arg("rows"), py::arg("hidden"), py::arg("vocab"), py::arg("dtype"), py::arg("cuda"), py::arg("backward"),
      py::arg("budget_bytes"), py::arg("weight_grad") = true);

  bind_argument_structs(m);
  bind_cpu_launchers(m);
  bind_cuda_launchers(m);
}
