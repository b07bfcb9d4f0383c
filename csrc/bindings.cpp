// spot_ext._C: facts about the build and control of the instruction set. No tensors, no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& joined, char by) {
  std::vector<std::string> parts;
  std::istringstream text(joined);
  for (std::string part; std::getline(text, part, by);)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = SPOT_VERSION;
  info["compiler"] = SPOT_COMPILER;
  info["build_type"] = SPOT_BUILD_TYPE;
  info["torch_headers"] = SPOT_TORCH_HEADERS;
  info["torch_target"] = SPOT_TORCH_TARGET;
  info["isas"] = split(spot_isas_built(), ',');
  info["cuda"] = SPOT_CUDA_VERSION;
  info["cuda_archs"] = split(SPOT_CUDA_ARCHS, ',');
  return info;
}

void set_isa(const std::string& name) {
  if (!spot_set_isa(name.c_str()))
    throw py::value_error("isa must be one of " + std::string(spot_isas_usable()) +
                          " on this processor, got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of the SPOT libraries and control of the CPU instruction set.";
  m.def("build_info", &build_info, "Versions, compiler, instruction sets and CUDA architectures.");
  m.def("isa", [] { return std::string(spot_isa()); }, "Instruction set in use.");
  m.def(
      "isas", [] { return split(spot_isas_usable(), ','); },
      "Usable on this processor, best last.");
  m.def("set_isa", &set_isa, py::arg("name"), "Chooses the instruction set of all CPU kernels.");
}
