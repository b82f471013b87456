// Which instruction sets are compiled in, and which one this process uses.
#pragma once
#include "core/common.h"

#if defined(__x86_64__)
#define PK_FOR_EACH_ISA(X, ...) X(base, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx512_bf16, __VA_ARGS__)
#else
#define PK_FOR_EACH_ISA(X, ...) X(base, __VA_ARGS__)
#endif

namespace prefkern {

enum class Isa : int {
#define PK_ISA_ENUM(name, ...) name,
  PK_FOR_EACH_ISA(PK_ISA_ENUM)
#undef PK_ISA_ENUM
};

// Best the CPU has, or a lower one asked for by PREFKERN_CPU_ISA (read once).
PK_API Isa cpu_isa();
PK_API const char* isa_name(Isa isa);
PK_API const char* compiled_isas();      // comma separated
PK_API const char* detected_features();  // comma separated, of those that matter here

}  // namespace prefkern

// Each *_cpu.cpp is compiled once per instruction set and defines `const Table name`, a table of its functions, in the
// namespace of that set. PK_ISA_TABLE(Table, name), used in namespace prefkern by a file that is compiled once, declares
// them all and defines `name()`, which returns the one to use. The tables are constants: nothing of a higher
// instruction set runs while the library loads.
#define PK_ISA_TABLE_DECLARE(isa_, Table, name) \
  namespace isa_ {                              \
  extern const Table name;                      \
  }
#define PK_ISA_TABLE_CASE(isa_, Table, name) \
  case Isa::isa_: return isa_::name;
#define PK_ISA_TABLE(Table, name)                         \
  PK_FOR_EACH_ISA(PK_ISA_TABLE_DECLARE, Table, name)      \
  static const Table& name() {                            \
    switch (cpu_isa()) {                                  \
      PK_FOR_EACH_ISA(PK_ISA_TABLE_CASE, Table, name)     \
    }                                                     \
    return base::name;                                    \
  }
