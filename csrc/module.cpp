// The Python module. Importing it also runs the registrations of every csrc/*/cpu.cpp that is linked beside it.
#include <cstdint>
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

// The instruction sets compiled in, and the one that the loader picks on this machine: what KD_MULTIVERSION does.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && !defined(KD_ONE_VERSION)
py::tuple cpu_sets() { return py::make_tuple("avx512", "avx2", "baseline"); }

std::string cpu_set() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  return __builtin_cpu_supports("x86-64-v3") ? "avx2" : "baseline";
}
#else
py::tuple cpu_sets() { return py::make_tuple("baseline"); }
std::string cpu_set() { return "baseline"; }
#endif

py::dict build_info() {
  const int major = kTorchTarget >> 56, minor = (kTorchTarget >> 48) & 0xff;
  const std::string cuda = KDFAST_CUDA_VERSION;
  py::dict info;
  info["torch_target"] = std::to_string(major) + "." + std::to_string(minor);
  info["compiler"] = compiler();
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  info["cuda_archs"] = py::tuple(py::str(KDFAST_CUDA_ARCHS).attr("split")());
  info["cpu_sets"] = cpu_sets();
  info["cpu_set"] = cpu_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this extension was built, and the instruction set it uses here.");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { kdfast::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Asks for huge pages at memory that has not been touched yet.");
}
