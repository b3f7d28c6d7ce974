// Maps read kStep consecutive elements at a time, as the accumulation type A, on a GPU.
#pragma once

#include "common/group.cuh"
#include "common/layout.h"

namespace kdfast {

// Elements [at, at + kStep) of a sample in the given order; 0 beyond its end.
template <class A>
__device__ void read(const Map& x, const Order& order, int64_t sample, int64_t at, A (&to)[kStep]) {
  const int64_t offset = sample * x.sample;
  if (is_dense(x, order)) return read(Matrix{x.data, x.dtype, x.sample, 1}, sample, at, order.size(), A(0), to);
  int64_t outer = at / order.inner, inner = at % order.inner;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    to[i] = outer < order.outer ? read_one<A>(x.data, x.dtype, offset + outer * x.outer + inner * x.inner) : A(0);
    if (++inner == order.inner) inner = 0, ++outer;
  }
}

}  // namespace kdfast
