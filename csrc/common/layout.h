// Maps (B, C, positions...) in memory. A sample's elements are counted as they lie there: channel after channel, or
// position after position (channels_last). Of two networks' maps both are counted as the student's lie, so that they
// are read in one direction, mostly as they are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/tensor.h"

namespace kdfast {

inline int64_t positions(const Tensor& x) {
  int64_t n = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) n *= x.size(dim);
  return n;
}

// Element e of a sample is number e % inner of row e / inner. by_channel: rows are positions, else channels.
struct Order {
  int64_t outer, inner;
  bool by_channel;

  explicit Order(const Tensor& x) : Order(x, positions(x) == 1 || (x.size(1) > 1 && x.stride(1) == 1)) {}
  Order(const Tensor& x, bool by_channel)
      : outer(by_channel ? positions(x) : x.size(1)),
        inner(by_channel ? x.size(1) : positions(x)),
        by_channel(by_channel) {}
  KD_HD int64_t size() const { return outer * inner; }
};

// A map (B, C, N) of any type and strides, in elements.
struct Map {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t sample = 0, outer = 0, inner = 0;
};

inline Map map(const Tensor& x, const Order& order) {
  const int64_t channel = x.stride(1), position = x.stride(2);
  return {x.data_ptr(), x.scalar_type(), x.stride(0), order.by_channel ? position : channel,
          order.by_channel ? channel : position};
}

// Whether a sample's elements follow each other in that order.
KD_HD bool is_dense(const Map& x, const Order& order) {
  return (x.inner == 1 || order.inner == 1) && (x.outer == order.inner || order.outer == 1);
}

// The gradient of a map, dense in the student's order; null where none is needed.
struct MapGrad {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  MapGrad(const Tensor& x, bool needed) : data(needed ? x.data_ptr() : nullptr), dtype(x.scalar_type()) {}
  // Samples as rows.
  Matrix rows(const Order& order) const { return {data, dtype, order.size(), 1}; }

  // Whether values of type A come here through a buffer.
  template <class A>
  bool copied() const {
    return data && dtype != (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
  }
};

// Memory for the gradient of x, dense in the order that the student has.
inline Tensor gradient(const Tensor& x, const Tensor& student, bool wanted) {
  if (!wanted) return empty(x, x.scalar_type(), {0});
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < x.dim(); ++dim) sizes.push_back(x.size(dim));
  if (!Order(student).by_channel || positions(x) == 1) return empty(x, x.scalar_type(), sizes);
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(x.size(1));
  Tensor out = empty(x, x.scalar_type(), sizes);
  for (int64_t dim = 1; dim + 1 < x.dim(); ++dim) out = torch::stable::transpose(out, dim, x.dim() - 1);
  return out;
}

}  // namespace kdfast
