# Target spot_torch: torch's headers, the stable-ABI target and the sonames to link against.
#
# Not find_package(Torch): it demands the CUDA toolkit torch was built with. Nor torch's libraries:
# empty stubs with the right sonames give the NEEDED entries, and undefined symbols are found in the
# torch that the process has already loaded.
if(NOT SPOT_TORCH_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE SPOT_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT EXISTS "${SPOT_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "SPOT needs the headers of torch >= 2.11. Looked in '${SPOT_TORCH_DIR}'. "
    "Install torch first, or set SPOT_TORCH_DIR to the folder of the torch package.")
endif()
set(SPOT_TORCH_VERSION "unknown")
if(EXISTS "${SPOT_TORCH_DIR}/version.py")
  file(STRINGS "${SPOT_TORCH_DIR}/version.py" line REGEX "^__version__ *=")
  string(REGEX REPLACE ".*['\"](.+)['\"].*" "\\1" SPOT_TORCH_VERSION "${line}")
endif()
message(STATUS "SPOT: torch ${SPOT_TORCH_VERSION} headers from ${SPOT_TORCH_DIR}")

file(WRITE "${CMAKE_BINARY_DIR}/stubs/empty.cpp" "")
function(spot_stub name)
  add_library(stub_${name} SHARED "${CMAKE_BINARY_DIR}/stubs/empty.cpp")
  set_target_properties(stub_${name} PROPERTIES
    OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stubs")
endfunction()
spot_stub(torch_cpu)
spot_stub(torch)

add_library(spot_torch INTERFACE)
target_include_directories(spot_torch SYSTEM INTERFACE "${SPOT_TORCH_DIR}/include")
target_compile_definitions(spot_torch INTERFACE TORCH_TARGET_VERSION=${SPOT_TORCH_TARGET})
target_link_options(spot_torch INTERFACE "LINKER:--no-as-needed" "LINKER:--exclude-libs,ALL")
target_link_libraries(spot_torch INTERFACE stub_torch_cpu)
