# The CUDA kernels: in libmegalodon_ops where there is a CUDA compiler, and for the host executor in tests.

# A room may be without its CUDA wing; run_on() says so when it is asked for.
foreach(source IN LISTS cuda_sources)
  if(NOT EXISTS ${PROJECT_SOURCE_DIR}/${source})
    list(REMOVE_ITEM cuda_sources ${source})
  endif()
endforeach()

# ---- with nvcc, into libmegalodon_ops --------------------------------------------------------------------------------

# sm_80 as machine code and as PTX, which later GPUs compile for themselves; sm_90a for Hopper's own instructions.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "The GPU architectures to build for")
endif()
if(MEGALODON_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
endif()
if(MEGALODON_CUDA STREQUAL "ON" OR (MEGALODON_CUDA STREQUAL "AUTO" AND CMAKE_CUDA_COMPILER))
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  add_library(ops_cuda OBJECT cuda/core/device.cu ${cuda_sources})
  target_include_directories(ops_cuda PRIVATE cpp cuda)
  string(REPLACE ";" ", " architectures "${CMAKE_CUDA_ARCHITECTURES}")
  target_compile_definitions(ops_cuda PRIVATE MEGALODON_WITH_CUDA MEGALODON_CUDA_ARCHITECTURES="${architectures}")
  set_target_properties(ops_cuda PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
  target_compile_definitions(ops_portable PRIVATE MEGALODON_WITH_CUDA)  # the C functions
  target_compile_definitions(megalodon_ops PRIVATE MEGALODON_CUDA_VERSION="${CUDAToolkit_VERSION}")
  target_sources(megalodon_ops PRIVATE $<TARGET_OBJECTS:ops_cuda>)
  # The static runtime loads the driver at the first call, not before: the library works where there is none.
  target_link_libraries(megalodon_ops PRIVATE CUDA::cudart_static)
  set_target_properties(megalodon_ops PROPERTIES LINKER_LANGUAGE CXX)
endif()

# ---- with the C++ compiler, for the executor ---------------------------------------------------------------------------

set(MEGALODON_SIMT OFF CACHE STRING "Also build the CUDA kernels to run on the CPU, for tests: OFF, ON (plain), or a \
list of plain, asan and race")
if(MEGALODON_SIMT STREQUAL "ON")
  set(simt_builds plain)
elseif(MEGALODON_SIMT)
  set(simt_builds ${MEGALODON_SIMT})
endif()

# Two targets per build: the extension module _C_simt{,_asan,_race}, and simt_tests_{build}, the executor's own tests.
# Everything in the asan build is instrumented, in the race build only the kernels.
foreach(build IN LISTS simt_builds)
  set(suffix "")
  if(NOT build STREQUAL "plain")
    set(suffix _${build})
  endif()
  add_library(simt_executor_${build} OBJECT cuda/simt/executor.cpp cuda/simt/fiber.cpp cuda/simt/memory.cpp
              cuda/simt/race.cpp cpp/core/isa.cpp cpp/core/parallel.cpp cpp/core/tensor.cpp)
  list(TRANSFORM op_sources PREPEND ${PROJECT_SOURCE_DIR}/ OUTPUT_VARIABLE simt_op_sources)
  add_library(simt_entries_${build} OBJECT ${simt_op_sources})
  add_library(simt_kernels_${build} OBJECT ${cuda_sources})
  add_library(simt_test_kernels_${build} OBJECT tests/simt/kernels.cu)
  add_executable(simt_tests_${build} tests/simt/main.cpp $<TARGET_OBJECTS:simt_test_kernels_${build}>
                 $<TARGET_OBJECTS:simt_executor_${build}>)
  set(simt_targets simt_executor_${build} simt_entries_${build} simt_kernels_${build} simt_test_kernels_${build}
                   simt_tests_${build})
  if(MEGALODON_PYTHON)
    pybind11_add_module(_C_simt${suffix} MODULE NO_EXTRAS cpp/bind/module.cpp cpp/bind/borrow.cpp
                        $<TARGET_OBJECTS:simt_executor_${build}> $<TARGET_OBJECTS:simt_entries_${build}>
                        $<TARGET_OBJECTS:simt_kernels_${build}>)
    target_compile_definitions(_C_simt${suffix} PRIVATE MEGALODON_EXTENSION=_C_simt${suffix})
    target_link_libraries(_C_simt${suffix} PRIVATE Threads::Threads)
    if(MEGALODON_IN_PLACE)
      set_target_properties(_C_simt${suffix} PROPERTIES
                            LIBRARY_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/python/megalodon_ops)
    endif()
    list(APPEND simt_targets _C_simt${suffix})
  endif()
  set_source_files_properties(${cuda_sources} tests/simt/kernels.cu PROPERTIES LANGUAGE $<IF:1,CXX,CXX>)
  foreach(target IN LISTS simt_targets)
    target_include_directories(${target} PRIVATE cpp cuda)
    target_compile_definitions(${target} PRIVATE MEGALODON_SIMT MEGALODON_VERSION="${PROJECT_VERSION}")
    target_compile_options(${target} PRIVATE ${kernel_options} -ffp-contract=off -g)
    if(build STREQUAL "asan")
      target_compile_options(${target} PRIVATE -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
                             -fno-omit-frame-pointer)
      target_link_options(${target} PRIVATE -fsanitize=address,undefined)
    elseif(build STREQUAL "race")
      target_compile_definitions(${target} PRIVATE MEGALODON_SIMT_RACE)
    endif()
  endforeach()
  target_compile_definitions(simt_entries_${build} PRIVATE MEGALODON_ISA=portable MEGALODON_ENTRY)
  if(build STREQUAL "race")
    foreach(target simt_kernels_race simt_test_kernels_race)
      target_compile_options(${target} PRIVATE -O1 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0)
    endforeach()
  endif()
endforeach()
