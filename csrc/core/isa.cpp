#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace prefkern {
namespace {

struct Level {
  Isa isa;
  const char* name;
};
constexpr Level kLevels[] = {
#define PK_LEVEL(name, ...) {Isa::name, #name},
    PK_FOR_EACH_ISA(PK_LEVEL)
#undef PK_LEVEL
};

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  switch (isa) {
    case Isa::base: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::base;
}

Isa pick() {
  const char* wanted = std::getenv("PREFKERN_CPU_ISA");
  Isa best = Isa::base;
  for (const Level& level : kLevels) {
    if (supported(level.isa)) best = level.isa;
    if (wanted && !std::strcmp(wanted, level.name)) break;  // never above the wanted one
  }
  return best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = pick();
  return isa;
}

const char* isa_name(Isa isa) { return kLevels[static_cast<int>(isa)].name; }

const char* compiled_isas() {
  static const std::string text = [] {
    std::string s;
    for (const Level& level : kLevels) s += (s.empty() ? "" : ",") + std::string(level.name);
    return s;
  }();
  return text.c_str();
}

const char* detected_features() {
  static const std::string text = [] {
    std::string s;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define PK_FEATURE(name) if (__builtin_cpu_supports(name)) s += (s.empty() ? "" : ",") + std::string(name);
    PK_FEATURE("avx")
    PK_FEATURE("avx2")
    PK_FEATURE("fma")
    PK_FEATURE("f16c")
    PK_FEATURE("avx512f")
    PK_FEATURE("avx512bw")
    PK_FEATURE("avx512vl")
    PK_FEATURE("avx512bf16")
#undef PK_FEATURE
#elif defined(__aarch64__)
    s = "neon";
#endif
    return s;
  }();
  return text.c_str();
}

}  // namespace prefkern
