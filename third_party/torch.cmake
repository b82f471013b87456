# The installed torch: its headers and libtorch_cpu.so. find_package(Torch) is not used: it drags in checks of a CUDA
# toolkit that the CPU side does not need, and plain C++ linking that would tie the binary to one version of torch.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/build_backend/locate.py" torch
  OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _rc)
if(NOT _rc EQUAL 0)
  message(FATAL_ERROR "prefkern: no torch >= 2.11 found to build against; install torch first or set PREFKERN_TORCH_DIR")
endif()
message(STATUS "prefkern: torch at ${TORCH_DIR}")
add_library(torch_stable SHARED IMPORTED)
set_target_properties(torch_stable PROPERTIES IMPORTED_LOCATION "${TORCH_DIR}/lib/libtorch_cpu.so")
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")

string(REPLACE "." ";" _version "${PREFKERN_TORCH_TARGET}")
list(GET _version 0 _major)
list(GET _version 1 _minor)
math(EXPR PREFKERN_TORCH_ABI "(${_major} << 56) | (${_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)
