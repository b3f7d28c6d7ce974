// The logits of many networks, as one argument of a kernel.
#pragma once

#include "common/tensor.h"

namespace kdfast {

constexpr int64_t kMaxNetworks = 128;  // in one call: kernel parameters are limited to 4 KiB

// Matrices [rows, cols] of one dtype and any strides.
struct Networks {
  void* data[kMaxNetworks];
  int64_t row_stride[kMaxNetworks], col_stride[kMaxNetworks];
  ScalarType dtype;
  int64_t count;

  KD_HD Matrix operator[](int64_t i) const { return {data[i], dtype, row_stride[i], col_stride[i]}; }
};

inline Networks networks_of(const std::vector<Tensor>& tensors) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMaxNetworks, "kdfast: from 1 to ", kMaxNetworks, " networks, got ", count);
  Networks networks;
  networks.dtype = tensors[0].scalar_type();
  networks.count = count;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(tensors[i].scalar_type() == networks.dtype, "kdfast: networks of one call have one dtype");
    networks.data[i] = tensors[i].data_ptr();
    networks.row_stride[i] = tensors[i].stride(0);
    networks.col_stride[i] = tensors[i].stride(1);
  }
  return networks;
}

// Contiguous gradients [count, rows, cols] of networks; a null pointer where none are needed.
struct NetworkGrads {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t element_size = 0, count = 0, rows = 0, cols = 0;

  KD_HD Matrix operator[](int64_t m) const {
    return {static_cast<char*>(data) + m * rows * cols * element_size, dtype, cols, 1};
  }
};

inline NetworkGrads network_grads(const Tensor& x, bool needed = true) {
  if (!needed) return {};
  return {x.data_ptr(), x.scalar_type(), static_cast<int64_t>(x.element_size()), x.size(0), x.size(1), x.size(2)};
}

// A term of weight 0 is 0, even where it is infinite.
template <class A>
KD_HD A weighted(A weight, A x) {
  return weight == 0 ? A(0) : weight * x;
}

}  // namespace kdfast
