// The Python module: what was built, and which of the libraries beside it, one for each instruction set, runs here.
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>

// The pybind11 that comes with torch 2.11 refuses to be included where the stable ABI's version is set.
constexpr uint64_t kTorchTarget = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include "common/huge_pages.h"

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

// Whether this processor has the instruction set of a library of kernels.
bool has(const std::string& set) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (set == "avx2") return __builtin_cpu_supports("x86-64-v3");
  if (set == "avx512") return __builtin_cpu_supports("x86-64-v4");
#endif
  return set == "baseline";
}

// The instruction set whose library runs here: the widest of those built that this processor has, or the one that
// KDFAST_ISA names.
std::string cpu_set() {
  const char* const wanted = std::getenv("KDFAST_ISA");
  std::istringstream built(KDFAST_CPU_SETS);  // the narrowest first
  std::string widest, known;
  for (std::string set; built >> set;) {
    if (!has(set)) continue;
    if (wanted && set == wanted) return set;
    known += (known.empty() ? "" : ", ") + set;
    widest = set;
  }
  if (!wanted || !*wanted) return widest;
  throw py::value_error("KDFAST_ISA must be one of " + known + " here, got '" + wanted + "'");
}

py::dict build_info() {
  const int major = kTorchTarget >> 56, minor = (kTorchTarget >> 48) & 0xff;
  const std::string cuda = KDFAST_CUDA_VERSION;
  py::dict info;
  info["torch_target"] = std::to_string(major) + "." + std::to_string(minor);
  info["compiler"] = compiler();
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  info["cuda_archs"] = py::tuple(py::str(KDFAST_CUDA_ARCHS).attr("split")());
  info["cpu_sets"] = py::tuple(py::str(KDFAST_CPU_SETS).attr("split")());
  info["cpu_set"] = cpu_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How the kernels were built, and the instruction set they use here.");
  m.def("cpu_set", &cpu_set, "The instruction set whose kernels run here; ValueError if KDFAST_ISA names none.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { kdfast::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Asks for huge pages at memory that has not been touched yet.");
}
