// The Python module: how the libraries beside it were built. Nothing but `kdfast doctor` reads it.
#include <cstdint>
#include <string>

// The pybind11 that comes with torch 2.11 refuses to be included where the stable ABI's version is set.
constexpr uint64_t kTorchTarget = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  const int major = kTorchTarget >> 56, minor = (kTorchTarget >> 48) & 0xff;
  const std::string cuda = KDFAST_CUDA_VERSION;
  py::dict info;
  info["compiler"] = compiler();
  info["torch_target"] = std::to_string(major) + "." + std::to_string(minor);
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  info["archs"] = py::list(py::str(KDFAST_CUDA_ARCHS).attr("split")());
  info["cpu_sets"] = py::list(py::str(KDFAST_CPU_SETS).attr("split")());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How the kernels were built; the keys are those of _build.json.");
}
