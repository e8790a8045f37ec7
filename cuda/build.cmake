# The CUDA kernels: with nvcc into libmegalodon_ops, and with the C++ compiler for the host executor of the tests.

# ---- nvcc ------------------------------------------------------------------------------------------------------------

if(NOT no_cuda)
  find_package(CUDAToolkit REQUIRED)
  # What is by Hopper's own instructions is compiled for it alone, if it is among the architectures.
  set(hopper_sources ${cuda_sources})
  list(FILTER hopper_sources INCLUDE REGEX "_wgmma\\.cu$")
  list(REMOVE_ITEM cuda_sources ${hopper_sources} "")
  add_library(ops_cuda OBJECT cuda/core/device.cu ${cuda_sources})
  set(cuda_objects $<TARGET_OBJECTS:ops_cuda>)
  set(cuda_targets ops_cuda)
  if(hopper_sources AND CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
    add_library(ops_hopper OBJECT ${hopper_sources})
    set_target_properties(ops_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real)
    list(APPEND cuda_objects $<TARGET_OBJECTS:ops_hopper>)
    list(APPEND cuda_targets ops_hopper)
  endif()
  string(REPLACE ";" ", " architectures "${CMAKE_CUDA_ARCHITECTURES}")
  set(launcher sh ${PROJECT_SOURCE_DIR}/cuda/keep_report.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  foreach(target IN LISTS cuda_targets)
    target_include_directories(${target} PRIVATE cpp cuda)
    target_compile_definitions(${target} PRIVATE MEGALODON_WITH_CUDA MEGALODON_CUDA_ARCHITECTURES="${architectures}")
    target_compile_options(${target} PRIVATE --threads=2)  # the largest file, when all others are done
    set_target_properties(${target} PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_COMPILER_LAUNCHER "${launcher}")
  endforeach()
  target_compile_definitions(ops_portable PRIVATE MEGALODON_WITH_CUDA)  # the C functions, which route by device
  target_compile_definitions(megalodon_ops PRIVATE MEGALODON_CUDA_VERSION="${CUDAToolkit_VERSION}")
  target_sources(megalodon_ops PRIVATE ${cuda_objects})
  # The static runtime looks for the driver at its first call: the library loads where there is none.
  target_link_libraries(megalodon_ops PRIVATE CUDA::cudart_static)
  set_target_properties(megalodon_ops PROPERTIES LINKER_LANGUAGE CXX)
  # The matrix instructions as the hardware has them (tests/gpu_check.py).
  add_executable(cuda_conformance EXCLUDE_FROM_ALL tests/conformance/program.cu cuda/core/device.cu)
  set(conformance_targets cuda_conformance)
  if(TARGET ops_hopper)
    add_library(cuda_conformance_hopper OBJECT EXCLUDE_FROM_ALL tests/conformance/program_wgmma.cu)
    set_target_properties(cuda_conformance_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real)
    target_link_libraries(cuda_conformance PRIVATE cuda_conformance_hopper)
    list(APPEND conformance_targets cuda_conformance_hopper)
  endif()
  foreach(target IN LISTS conformance_targets)
    target_include_directories(${target} PRIVATE cpp cuda)
    target_compile_definitions(${target} PRIVATE $<TARGET_PROPERTY:ops_cuda,COMPILE_DEFINITIONS>)
  endforeach()
  target_link_libraries(cuda_conformance PRIVATE CUDA::cudart_static)
endif()

# ---- the executor ----------------------------------------------------------------------------------------------------

set(MEGALODON_SIMT OFF CACHE STRING
    "Also build the CUDA kernels to run on the CPU, for tests: OFF, or a list of plain, asan and race")
if(NOT MEGALODON_SIMT)
  return()
endif()

# A .cu file as a C++ source: one that includes it.
set(test_sources tests/simt/kernels.cu tests/simt/kernels_hopper.cu)
set(conformance_sources tests/conformance/program.cu tests/conformance/program_wgmma.cu)
foreach(source IN LISTS cuda_sources hopper_sources test_sources conformance_sources)
  set(wrapper ${PROJECT_BINARY_DIR}/wrapped/${source}.cpp)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${PROJECT_SOURCE_DIR}/${source}\"\n")
  list(APPEND simt_kernel_sources ${wrapper})
endforeach()
list(POP_BACK simt_kernel_sources simt_conformance_wgmma simt_conformance simt_hopper_test_kernels simt_test_kernels)

# The C functions, whose CPU kernels never run here, and the binding.
add_library(simt_entries OBJECT ${op_sources} cpp/core/isa.cpp cpp/core/parallel.cpp cpp/core/tensor.cpp)
target_compile_definitions(simt_entries PRIVATE MEGALODON_ISA=portable MEGALODON_ENTRY)
list(APPEND simt_targets simt_entries)
if(MEGALODON_PYTHON)
  add_library(simt_bind OBJECT cpp/bind/module.cpp cpp/bind/borrow.cpp)
  target_link_libraries(simt_bind PRIVATE pybind11::module)
  list(APPEND simt_targets simt_bind)
endif()

# Per build: the extension module in a folder named like the tests' backend (simt, simt_asan, simt_race), which runs the
# CUDA kernels on CPU tensors; simt_tests_{build}, the executor's own tests, and simt_conformance_{build}, the matrix
# instructions on raw registers. asan instruments kernels and executor, race the kernels alone.
foreach(build IN LISTS MEGALODON_SIMT)
  add_library(simt_executor_${build} OBJECT cuda/simt/bulk.cpp cuda/simt/executor.cpp cuda/simt/fiber.cpp
                                            cuda/simt/memory.cpp cuda/simt/race.cpp cuda/simt/schedule.cpp
                                            cuda/simt/wgmma.cpp)
  add_library(simt_kernels_${build} OBJECT ${simt_kernel_sources})
  add_library(simt_test_kernels_${build} OBJECT ${simt_test_kernels} ${simt_hopper_test_kernels})
  target_include_directories(simt_test_kernels_${build} PRIVATE tests/simt)
  add_executable(simt_tests_${build} tests/simt/main.cpp)
  target_link_libraries(simt_tests_${build} PRIVATE simt_executor_${build} simt_test_kernels_${build})
  add_executable(simt_conformance_${build} ${simt_conformance} ${simt_conformance_wgmma})
  target_include_directories(simt_conformance_${build} PRIVATE tests/conformance)
  target_link_libraries(simt_conformance_${build} PRIVATE simt_executor_${build})
  list(APPEND simt_targets simt_executor_${build} simt_kernels_${build} simt_test_kernels_${build} simt_tests_${build}
                           simt_conformance_${build})
  list(APPEND simt_executors simt_executor_${build})
  if(MEGALODON_PYTHON)
    set(backend simt_${build})
    if(build STREQUAL "plain")
      set(backend simt)
    endif()
    add_library(${backend} MODULE $<TARGET_OBJECTS:simt_bind>)
    pybind11_extension(${backend})
    set_target_properties(${backend} PROPERTIES OUTPUT_NAME _C LINKER_LANGUAGE CXX
                                                LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/${backend})
    target_link_libraries(${backend} PRIVATE simt_entries simt_executor_${build} simt_kernels_${build} Threads::Threads)
    list(APPEND simt_targets ${backend})
  endif()
  if(build STREQUAL "asan")
    set(sanitize -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    foreach(part executor kernels test_kernels conformance)
      target_compile_options(simt_${part}_asan PRIVATE ${sanitize} -fno-omit-frame-pointer)
      target_link_options(simt_${part}_asan INTERFACE ${sanitize})
    endforeach()
  elseif(build STREQUAL "race")
    target_compile_definitions(simt_executor_race PRIVATE MEGALODON_SIMT_RACE)
    foreach(part kernels test_kernels conformance)
      target_compile_options(simt_${part}_race PRIVATE -fsanitize=thread --param=tsan-instrument-func-entry-exit=0)
    endforeach()
  elseif(NOT build STREQUAL "plain")
    message(FATAL_ERROR "MEGALODON_SIMT must be OFF, or a list of plain, asan and race; got ${MEGALODON_SIMT}")
  endif()
endforeach()
add_custom_target(simt_all DEPENDS ${simt_targets})

# -Wno-uninitialized: registers of a loop that only nvcc unrolls. -O0 what hardly runs, -O2 what runs much, -O1 what
# takes g++ too long at -O2.
foreach(target IN LISTS simt_targets)
  target_include_directories(${target} PRIVATE cpp cuda)
  target_compile_definitions(${target} PRIVATE MEGALODON_SIMT MEGALODON_VERSION="${PROJECT_VERSION}")
  set(optimize -O1)
  if(target STREQUAL "simt_entries")
    set(optimize -O0)
  elseif(target STREQUAL "simt_kernels_plain" OR target IN_LIST simt_executors)
    set(optimize -O2)
  endif()
  target_compile_options(${target} PRIVATE ${kernel_options} -ffp-contract=off -Wno-uninitialized -g1 ${optimize})
endforeach()
