# CUTLASS' headers, for the kernels of Hopper's tensor cores. Without them, or without 9.0a among the architectures, the build goes
# on without those kernels, and `prefkern info` says so.
set(PREFKERN_CUTLASS_INCLUDE "")
set(PREFKERN_HOPPER_ARCH "${PREFKERN_CUDA_ARCH_LIST}")
list(FILTER PREFKERN_HOPPER_ARCH INCLUDE REGEX "^90a")
if(PREFKERN_HAVE_CUDA AND PREFKERN_HOPPER_ARCH)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/build_backend/locate.py" cutlass
    OUTPUT_VARIABLE _cutlass OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _rc)
  if(_rc EQUAL 0)
    file(STRINGS "${_cutlass}/cutlass/version.h" _lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^0-9]+" ";" _numbers "${_lines}")
    list(FILTER _numbers EXCLUDE REGEX "^$")
    list(JOIN _numbers "." _version)
    if(_version VERSION_LESS 4.2)
      message(STATUS "prefkern: CUTLASS ${_version} at ${_cutlass} is too old (4.2 or newer): no Hopper kernels")
    else()
      set(PREFKERN_CUTLASS_INCLUDE "${_cutlass}")
      message(STATUS "prefkern: CUTLASS ${_version} at ${_cutlass}")
    endif()
  else()
    message(STATUS "prefkern: no CUTLASS (pip install nvidia-cutlass, or set PREFKERN_CUTLASS_DIR): no Hopper kernels")
  endif()
endif()
