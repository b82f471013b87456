// How argument structs and launchers become Python's: what every room's bindings.h is written with, and the structs that
// several rooms share.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>

#include "core/common.h"
#include "core/cuda_runtime.h"
#include "core/gemm_cpu.h"
#include "core/gemm_bounded.h"
#include "core/sequence.h"

namespace prefkern {
namespace py = pybind11;

// ---- structs -------------------------------------------------------------------------------------------------------
// pybind11's def_readwrite compiles two functions for every member, and there are hundreds: minutes. Here all members
// share two, which are told where the member is and how its type is converted.
inline void* address(py::handle self, const std::type_info& type, const char* what) {
  py::detail::type_caster_generic caster(type);
  if (!caster.load(self, false))
    throw py::type_error(std::string(what) + ": another struct is expected than " + std::string(py::str(py::type::of(self))));
  return caster.value;
}

// A pointer is an integer, 0 is null; a struct inside a struct is that struct, not a copy.
template <class M> py::object get_member(void* at, py::handle owner) {
  M& member = *static_cast<M*>(at);
  if constexpr (std::is_pointer_v<M>) return py::int_(reinterpret_cast<uintptr_t>(member));
  else if constexpr (std::is_class_v<M>) return py::cast(&member, py::return_value_policy::reference_internal, owner);
  else return py::cast(member);
}
template <class M> void set_member(void* at, py::handle value) {
  M& member = *static_cast<M*>(at);
  if constexpr (std::is_pointer_v<M>) member = reinterpret_cast<M>(value.cast<uintptr_t>());
  else member = value.cast<M>();
}

struct MemberAccess {
  const char* name;
  const std::type_info* type;
  std::ptrdiff_t offset;
  py::object (*get)(void* at, py::handle owner);
  void (*set)(void* at, py::handle value);
  void* in(py::handle self) const { return static_cast<char*>(address(self, *type, name)) + offset; }
};

inline void bind_member(py::handle owner, const MemberAccess& m) {
  const py::cpp_function get([m](py::handle self) { return m.get(m.in(self), self); }, py::is_method(owner));
  const py::cpp_function set([m](py::handle self, py::handle value) { m.set(m.in(self), value); }, py::is_method(owner));
  owner.attr(m.name) = py::module_::import("builtins").attr("property")(get, set);
}

template <class T> class Struct {
 public:
  Struct(py::module_& m, const std::string& name, const char* doc = "") : class_(m, name.c_str(), doc) {
    class_.def(py::init<>());
  }
  template <class M> Struct& member(const char* name, M T::* member) {
    const T sample{};
    const auto offset = reinterpret_cast<const char*>(&(sample.*member)) - reinterpret_cast<const char*>(&sample);
    bind_member(class_, {name, &typeid(T), offset, &get_member<M>, &set_member<M>});
    return *this;
  }
  template <class F> Struct& def(const char* name, F&& f) {
    class_.def(name, std::forward<F>(f));
    return *this;
  }

 private:
  py::class_<T> class_;
};

// ---- launchers -----------------------------------------------------------------------------------------------------
// Likewise one function for all of them. The interpreter's lock is not held while one runs.
struct Launcher {
  const char* name;
  const std::type_info* type;  // of the argument struct
  void (*launch)();
  py::object (*call)(void (*launch)(), const void* args, void* stream);
};

template <class R, class Args> py::object call_cpu(void (*launch)(), const void* args, void*) {
  const auto function = reinterpret_cast<R (*)(const Args&)>(launch);
  const auto run = [&] {
    const py::gil_scoped_release release;
    return function(*static_cast<const Args*>(args));
  };
  if constexpr (std::is_void_v<R>) {
    run();
    return py::none();
  } else {
    return py::cast(run());
  }
}
template <class Args> py::object call_cuda(void (*launch)(), const void* args, void* stream) {
  int error;
  {
    const py::gil_scoped_release release;
    error = reinterpret_cast<int (*)(const Args&, void*)>(launch)(*static_cast<const Args*>(args), stream);
  }
  if (error != 0) throw std::runtime_error(cuda_error_string(error));
  return py::none();
}

template <class R, class Args> void bind_cpu(py::module_& m, const char* name, R (*launch)(const Args&)) {
  const Launcher l{name, &typeid(Args), reinterpret_cast<void (*)()>(launch), &call_cpu<R, Args>};
  m.def(name, [l](py::handle args) { return l.call(l.launch, address(args, *l.type, l.name), nullptr); }, py::arg("args"));
}
template <class Args> void bind_cuda(py::module_& m, const char* name, int (*launch)(const Args&, void*)) {
  const Launcher l{name, &typeid(Args), reinterpret_cast<void (*)()>(launch), &call_cuda<Args>};
  m.def(
      name,
      [l](py::handle args, uintptr_t stream) {
        return l.call(l.launch, address(args, *l.type, l.name), reinterpret_cast<void*>(stream));
      },
      py::arg("args"), py::arg("stream") = 0);
}

// ---- shared by rooms -----------------------------------------------------------------------------------------------
inline void bind_core(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::f32)
      .value("bfloat16", DType::bf16)
      .value("float16", DType::f16)
      .value("float64", DType::f64);
  py::enum_<BoundedProduct>(m, "BoundedProduct")
      .value("rows_nt", BoundedProduct::rows_nt)
      .value("rows_nn", BoundedProduct::rows_nn)
      .value("depth_tn", BoundedProduct::depth_tn);
  Struct<BoundedGemmArgs> gemm(m, "BoundedGemmArgs");
  gemm.member("product", &BoundedGemmArgs::product)
      .member("dtype", &BoundedGemmArgs::dtype)
      .member("m", &BoundedGemmArgs::m)
      .member("n", &BoundedGemmArgs::n)
      .member("k", &BoundedGemmArgs::k)
      .member("a_stride", &BoundedGemmArgs::a_stride)
      .member("b_stride", &BoundedGemmArgs::b_stride)
      .member("c_stride", &BoundedGemmArgs::c_stride)
      .member("accumulate", &BoundedGemmArgs::accumulate)
      .member("first", &BoundedGemmArgs::first);
  gemm.member("a", &BoundedGemmArgs::a);
  gemm.member("b", &BoundedGemmArgs::b);
  gemm.member("c", &BoundedGemmArgs::c);
  gemm.member("count", &BoundedGemmArgs::count);
  Struct<RowMap>(m, "RowMap", "Row r starts (r // inner) * outer_stride + (r % inner) * inner_stride elements after the base.")
      .member("inner", &RowMap::inner)
      .member("outer_stride", &RowMap::outer_stride)
      .member("inner_stride", &RowMap::inner_stride);
  Struct<SequenceLayout> layout(m, "SequenceLayout");
  layout.member("sequences", &SequenceLayout::sequences)
      .member("padded_length", &SequenceLayout::padded_length)
      .member("tokens", &SequenceLayout::tokens);
  layout.member("cu_seqlens", &SequenceLayout::cu_seqlens);
  Struct<GemmArgs> product(m, "GemmArgs", "C = alpha op(A) op(B) (+ C), row-major.");
  product.member("m", &GemmArgs::m).member("n", &GemmArgs::n).member("k", &GemmArgs::k);
  product.member("a_stride", &GemmArgs::a_stride)
      .member("b_stride", &GemmArgs::b_stride)
      .member("c_stride", &GemmArgs::c_stride);
  product.member("a_transposed", &GemmArgs::a_transposed).member("b_transposed", &GemmArgs::b_transposed);
  product.member("a_type", &GemmArgs::a_type).member("b_type", &GemmArgs::b_type);
  product.member("accumulate", &GemmArgs::accumulate).member("alpha", &GemmArgs::alpha).member("pairs", &GemmArgs::pairs);
  product.member("a", &GemmArgs::a);
  product.member("b", &GemmArgs::b);
  product.member("c", &GemmArgs::c);
}

inline void bind_core_cpu(py::module_& m) { bind_cpu(m, "cpu_multiply", &cpu_multiply); }

}  // namespace prefkern
