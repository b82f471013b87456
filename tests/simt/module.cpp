// The launchers of prefkern._C over kernels that run on the CPU, and the order in which their threads run.
#include "bindings.h"
#include "misuse.h"
#include "simt.h"
#include "tiles.h"

namespace py = pybind11;

PYBIND11_MODULE(simt_kernels, m) {
  prefkern::bind_argument_structs(m);
  prefkern::bind_cuda_launchers(m);
  py::enum_<simt::Order>(m, "Order")
      .value("forward", simt::Order::forward)
      .value("reverse", simt::Order::reverse)
      .value("random", simt::Order::random);
  m.def("set_order", &simt::set_order, py::arg("order"), py::arg("seed") = 0);
  m.def("launches", &simt::launches, "How many kernels have been launched so far.");
  m.def(
      "run_tiles",
      [](const prefkern::TileFoldArgs& args, uintptr_t logits, int64_t columns) {
        run_tiles(args, reinterpret_cast<const float*>(logits), columns);
      },
      py::arg("args"), py::arg("logits"), py::arg("columns"));
  m.def(
      "run_misuse",
      [](const std::string& name, unsigned blocks, unsigned threads, uintptr_t out) {
        run_misuse(name, blocks, threads, reinterpret_cast<float*>(out));
      },
      py::arg("name"), py::arg("blocks"), py::arg("threads"), py::arg("out"));
}
