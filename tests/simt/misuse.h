// Wrong kernels, and right ones beside them, for the tests of the emulator itself.
#pragma once
#include <string>

// Runs the kernel of that name with one block of `threads` threads. Those that compute something write out[thread].
void run_misuse(const std::string& name, unsigned threads, float* out);
