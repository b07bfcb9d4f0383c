# The linker keeps one copy of a weak symbol: an AVX-512 one could end up in baseline code. Unoptimised
# builds are where inline functions turn into such symbols, so the link fails when two ISAs share one.
set(objects "")
foreach(isa IN LISTS SPOT_ISAS)
  list(APPEND objects $<TARGET_OBJECTS:spot_kernels_${isa}>)
endforeach()
add_custom_command(
  TARGET spot_ops PRE_LINK
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/tools/build/shared_weak_symbols.py" ${objects}
  COMMAND_EXPAND_LISTS VERBATIM)
