# nvcc and the static CUDA runtime, when present: a toolkit, or NVIDIA's wheels. find_package(CUDAToolkit) is not used: it
# rejects the layout of the wheels.
set(PREFKERN_HAVE_CUDA OFF)
if(NOT PREFKERN_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/build_backend/locate.py" nvcc
      OUTPUT_VARIABLE _nvcc OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _rc)
    if(_rc EQUAL 0)
      set(ENV{CUDACXX} "${_nvcc}")
      get_filename_component(_root "${_nvcc}/../.." ABSOLUTE)
      if(EXISTS "${_root}/lib/libcudart_static.a" AND NOT EXISTS "${_root}/lib64")  # layout of NVIDIA's wheels
        set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${_root}/lib")
      endif()
    endif()
  endif()
  set(CMAKE_CUDA_STANDARD 17)  # before the language is enabled: else an old cmake asks nvcc for the C++ standard above
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_library(PREFKERN_CUDART_STATIC cudart_static REQUIRED
      HINTS "${CMAKE_CUDA_COMPILER_LIBRARY_ROOT}" "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}" ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES}
      PATH_SUFFIXES lib64 lib targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib)
    find_package(Threads REQUIRED)
    set(PREFKERN_HAVE_CUDA ON)
    if(PREFKERN_CUDA_ARCHS)
      set(PREFKERN_CUDA_ARCH_LIST ${PREFKERN_CUDA_ARCHS})
    else()
      set(PREFKERN_CUDA_ARCH_LIST 80-real 90a-real)
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
        list(APPEND PREFKERN_CUDA_ARCH_LIST 100-real 120-real)
      endif()
      list(APPEND PREFKERN_CUDA_ARCH_LIST 90-virtual)
    endif()
    set(PREFKERN_CUDA_FLAGS "")
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
      set(PREFKERN_CUDA_FLAGS --compress-mode=size)  # needs a driver that CUDA 13 needs anyway
    endif()
    message(STATUS "prefkern: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${PREFKERN_CUDA_ARCH_LIST}")
  elseif(PREFKERN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PREFKERN_CUDA=ON but no nvcc was found; set CUDACXX or PREFKERN_CUDA=OFF")
  endif()
endif()
if(NOT PREFKERN_HAVE_CUDA)
  message(WARNING "prefkern: no CUDA compiler is used: building the CPU kernels only (PREFKERN_CUDA=${PREFKERN_CUDA})")
endif()
