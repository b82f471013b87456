// Wrong kernels, and right ones beside them, for the tests of the emulator itself.
#pragma once
#include <string>

// Runs the kernel of that name. Those that compute something write to `out`, by default out[thread].
void run_misuse(const std::string& name, unsigned blocks, unsigned threads, float* out);
