# Build options and everything that holds for all targets.
option(HESTIA_TESTS "Build the tests" ON)
option(HESTIA_CUDA "Compile Hestia's own CUDA kernels (LibTorch's are always there)" ON)
option(HESTIA_WARNINGS_AS_ERRORS "Treat warnings in Hestia's own code as errors" ON)
option(HESTIA_OPENMP "Compile torch sources with OpenMP: without it at::parallel_for runs on one thread" ON)
option(HESTIA_USE_CCACHE "Compile through ccache when it is installed" ON)
set(HESTIA_SANITIZE "" CACHE STRING "Sanitizers for all targets, for example address,undefined")
set(HESTIA_VENV "${CMAKE_CURRENT_SOURCE_DIR}/build/venv" CACHE PATH "Python virtual environment that holds the pinned torch wheel")
# The environment variable of the same name is what scripts/setup.sh reads, so one setting serves both.
if("$ENV{HESTIA_HIDE_SYSTEM_CUDA}" STREQUAL "1")
  set(hestia_hide_default ON)
else()
  set(hestia_hide_default OFF)
endif()
option(HESTIA_HIDE_SYSTEM_CUDA "Ignore a CUDA toolkit of the system, take the one from PyPI" ${hestia_hide_default})

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")

# RUNPATH, not RPATH: LD_LIBRARY_PATH must be able to point a program at another machine's torch/lib.
# As needed: HDF5's link line names curl, krb5 and more, which another machine may not have and nothing here calls.
add_link_options(-Wl,--enable-new-dtags -Wl,--as-needed)

if(HESTIA_USE_CCACHE)
  find_program(HESTIA_CCACHE ccache)
  if(HESTIA_CCACHE)
    # ccache caches a compilation with a precompiled header only with these settings, and they must hold when ninja
    # runs, not when CMake does.
    set(CMAKE_CXX_COMPILER_LAUNCHER env CCACHE_SLOPPINESS=pch_defines,time_macros "${HESTIA_CCACHE}")
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${HESTIA_CCACHE}")
    if(NOT CMAKE_DISABLE_PRECOMPILE_HEADERS)
      add_compile_options($<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
    endif()
  endif()
endif()

# All targets, not only the torch-free ones: a precompiled header is refused when its user has other flags.
if(HESTIA_SANITIZE)
  if(HESTIA_CUDA)
    message(FATAL_ERROR "HESTIA_SANITIZE: nvcc cannot build sanitized kernels, got HESTIA_CUDA=ON; set it OFF (preset cpu-asan)")
  endif()
  add_compile_options(-fsanitize=${HESTIA_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${HESTIA_SANITIZE})
endif()
