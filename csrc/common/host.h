// What the host code of an op needs on every device. A family's host.h has its ops as templates over a backend, which
// is the struct of its cpu.cpp or cuda.cu that runs the loops or launches the kernels.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>

#include "common/tensor.h"

namespace kdfast {

using torch::stable::detail::StableLibrary;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class A>
A* data(const Tensor& x) {
  return static_cast<A*>(x.data_ptr());
}

// A null pointer where the tensor is not needed.
template <class A>
A* data(const Tensor& x, bool needed) {
  return needed ? data<A>(x) : nullptr;
}

// Stands for a result that is not needed.
inline Tensor nothing(const Tensor& like, ScalarType dtype) { return empty(like, dtype, {0}); }
inline Tensor nothing(const Tensor& like) { return nothing(like, like.scalar_type()); }

// The loss of a batch, or that of every row.
inline Tensor empty_loss(const Tensor& like, ScalarType dtype, bool reduce) {
  return reduce ? empty(like, dtype, {}) : empty(like, dtype, {like.size(0)});
}

// The gradient of a matrix. Where none is needed: a null matrix, and an empty tensor beside `any`.
struct MatrixGrad {
  Tensor tensor;
  Matrix m;
};

inline MatrixGrad matrix_grad(const Tensor& x, bool needed, const Tensor& any) {
  if (!needed) return {nothing(any), Matrix{}};
  Tensor tensor = empty(x, x.scalar_type(), {x.size(0), x.size(1)});
  return {tensor, matrix(tensor)};
}

// Scratch memory of n elements on the host, zeros at first, as a device's `DeviceMemory` (launch.cuh) is on the device.
template <class T>
class HostMemory {
 public:
  HostMemory(const Tensor&, int64_t n) : values_(n) {}
  T* data() { return values_.data(); }

 private:
  std::vector<T> values_;
};

// Base of the backends in cpu.cpp; those in cuda.cu have DeviceBackend (launch.cuh).
struct HostBackend {
  template <class T>
  using Memory = HostMemory<T>;

  explicit HostBackend(const Tensor&) {}
};

}  // namespace kdfast
