# One CMake target per module. cmake/layers.txt decides which module may use which, here on links at configure time and
# in tests/structure on includes and on the link graph that came out.
function(hestia_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion>)
  # g++ 12 reports overlapping copies inside libstdc++'s own string concatenation (gcc bug 105651).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
    # Under sanitizers it takes std::regex for uninitialised (gcc bug 105562).
    if(HESTIA_SANITIZE)
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
    endif()
  endif()
  if(HESTIA_WARNINGS_AS_ERRORS)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endfunction()

# Torch targets share one precompiled header: torch costs about 20 s a file without it.
function(hestia_torch_pch target)
  if(NOT TARGET hestia_pch)
    file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/hestia_pch.cpp" CONTENT "// Carries the precompiled header that all torch targets share.\n")
    add_library(hestia_pch STATIC "${CMAKE_BINARY_DIR}/hestia_pch.cpp")
    target_link_libraries(hestia_pch PUBLIC hestia_torch fmt::fmt)
    target_include_directories(hestia_pch PRIVATE "${CMAKE_SOURCE_DIR}/include")
    target_precompile_headers(hestia_pch PRIVATE "${CMAKE_SOURCE_DIR}/cmake/torch_pch.hpp")
    hestia_warnings(hestia_pch)
  endif()
  # The header was compiled with -fPIC, and g++ refuses it under the -fPIE that CMake gives programs.
  get_target_property(hestia_target_type ${target} TYPE)
  if(hestia_target_type STREQUAL "EXECUTABLE")
    set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
    target_compile_options(${target} PRIVATE -fPIC)
    # The wheel's libtorch.so exports a std::filesystem of its own, whose remove_all calls a null pointer (measured, torch
    # 2.11); with the system's libstdc++ first in search order the program never meets it.
    target_link_options(${target} PRIVATE "LINKER:--push-state,--no-as-needed" -lstdc++ "LINKER:--pop-state")
  endif()
  target_precompile_headers(${target} REUSE_FROM hestia_pch)
endfunction()

# What modules, programs and tests have in common: warnings, modules used, torch with its precompiled header.
function(hestia_configure_target target visibility torch)
  hestia_warnings(${target})
  foreach(module IN LISTS ARGN)
    target_link_libraries(${target} ${visibility} hestia_${module})
  endforeach()
  if(torch)
    target_link_libraries(${target} ${visibility} hestia_torch)
    hestia_torch_pch(${target})
  endif()
endfunction()

# hestia_module(name SOURCES a.cpp ... [USES core routing ...] [LINK lib ...] [TORCH]): the library hestia_<name>.
function(hestia_module name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;USES;LINK" ${ARGN})
  hestia_check_layer(${name} "${ARG_TORCH}" ${ARG_USES})
  add_library(hestia_${name} STATIC ${ARG_SOURCES})
  target_include_directories(hestia_${name} PUBLIC "${CMAKE_SOURCE_DIR}/include" PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
  hestia_configure_target(hestia_${name} PUBLIC "${ARG_TORCH}" ${ARG_USES})
  target_link_libraries(hestia_${name} PUBLIC ${ARG_LINK})
endfunction()

# hestia_program(name OUTPUT_NAME file SOURCES a.cpp ... [USES core ...] [LINK lib ...] [TORCH]): the program
# hestia_<name>, a layer like a module that nothing uses.
function(hestia_program name)
  cmake_parse_arguments(ARG "TORCH" "OUTPUT_NAME" "SOURCES;USES;LINK" ${ARGN})
  hestia_check_layer(${name} "${ARG_TORCH}" ${ARG_USES})
  add_executable(hestia_${name} ${ARG_SOURCES})
  set_target_properties(hestia_${name} PROPERTIES OUTPUT_NAME "${ARG_OUTPUT_NAME}")
  target_include_directories(hestia_${name} PRIVATE "${CMAKE_SOURCE_DIR}/include" "${CMAKE_CURRENT_SOURCE_DIR}")
  hestia_configure_target(hestia_${name} PRIVATE "${ARG_TORCH}" ${ARG_USES})
  target_link_libraries(hestia_${name} PRIVATE ${ARG_LINK})
endfunction()

# hestia_benchmark(name SOURCES a.cpp ... USES core ... [LINK lib ...] [TORCH]): a program that measures, in
# build/benchmarks; built with everything else so that it cannot rot, run by hand.
function(hestia_benchmark name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;USES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE "${CMAKE_SOURCE_DIR}/include")
  hestia_configure_target(${name} PRIVATE "${ARG_TORCH}" ${ARG_USES})
  target_link_libraries(${name} PRIVATE ${ARG_LINK})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/benchmarks")
endfunction()

# hestia_test(name SOURCES a.cpp ... USES core ... [LINK lib ...] [TORCH]): one Catch2 program, one ctest entry per test
# case. Programs without TORCH are built by the target torch_free_tests and carry the label torch_free: the sanitizer
# preset runs those.
function(hestia_test name)
  cmake_parse_arguments(ARG "TORCH" "" "SOURCES;USES;LINK" ${ARGN})
  if(NOT TARGET torch_free_tests)
    add_custom_target(torch_free_tests)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE "${CMAKE_SOURCE_DIR}/include" "${CMAKE_SOURCE_DIR}/tests/support" "${CMAKE_SOURCE_DIR}")
  target_compile_definitions(${name} PRIVATE HESTIA_SOURCE_DIR="${CMAKE_SOURCE_DIR}" HESTIA_BINARY_DIR="${CMAKE_BINARY_DIR}")
  hestia_configure_target(${name} PRIVATE "${ARG_TORCH}" ${ARG_USES})
  target_link_libraries(${name} PRIVATE hestia_test_main Catch2::Catch2 ${ARG_LINK})
  # What is tested is optimised in its own module: -O3 on the tests would only make them compile for longer.
  target_compile_options(${name} PRIVATE $<$<CONFIG:Release>:-O1>)
  if(ARG_TORCH)
    set(label torch)
  else()
    set(label torch_free)
    add_dependencies(torch_free_tests ${name})
    foreach(module IN LISTS ARG_USES)
      if(HESTIA_LAYER_${module}_TORCH)
        message(FATAL_ERROR "${name}: a test without TORCH cannot use '${module}', which links torch; add TORCH")
      endif()
    endforeach()
  endif()
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
  # A [gpu] test without a GPU warns and returns: ctest then lists it as skipped, not among the passed.
  # ctest runs tests side by side: a second thread in each would only wait for a core (a test that is about threads sets
  # their number itself).
  # NoTests: a name that ctest cannot hand on (brackets, semicolons) would otherwise match nothing and pass.
  catch_discover_tests(${name} TEST_PREFIX "${name}: " EXTRA_ARGS --warn NoTests
    PROPERTIES TIMEOUT 600 LABELS ${label} ENVIRONMENT OMP_NUM_THREADS=1 SKIP_REGULAR_EXPRESSION "no GPU: skipped|SKIPPED: (no|needs a) GPU")
endfunction()
