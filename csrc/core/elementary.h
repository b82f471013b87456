// The elementary functions that csrc/math is written in: vectorised ones on the CPU, CUDA's on the device, and CUDA's
// spelled in C++ when tests/simt runs device code on the CPU.
#pragma once
#if defined(__CUDACC__) || defined(PK_SIMT)
#include "core/cuda.cuh"
#else
#include "core/simd.h"
#endif
