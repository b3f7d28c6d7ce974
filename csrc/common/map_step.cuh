// Maps read kStep consecutive elements at a time, as the accumulation type A, on a GPU.
#pragma once

#include "common/group.cuh"
#include "common/layout.h"

namespace kdfast {

// Where an element of a sample is, and the next one after it.
struct Walk {
  int64_t outer, inner;
  Order order;

  __device__ Walk(const Order& order, int64_t at) : outer(at / order.inner), inner(at % order.inner), order(order) {}
  __device__ bool inside() const { return outer < order.outer; }
  __device__ void advance() {
    if (++inner == order.inner) inner = 0, ++outer;
  }
};

// Elements [at, at + kStep) of a sample in the given order.
template <class A>
__device__ Step<A> load(const Map& x, const Order& order, int64_t sample, int64_t at) {
  if (is_dense(x, order)) return load<A>(Matrix{x.data, x.dtype, x.sample, 1}, sample, at, order.size());
  Step<A> step;
  step.dtype = x.dtype;
  step.left = order.size() - at;
  const int64_t first = sample * x.sample;
  Walk walk(order, at);
  step.raw.gather(x.data, x.dtype, [&](int) {
    const Element place{walk.inside(), first + walk.outer * x.outer + walk.inner * x.inner};
    walk.advance();
    return place;
  });
  return step;
}

// The same elements of two maps, which are loaded at once; 0 beyond the end of the sample.
template <class A>
__device__ void read(const Map& a, const Map& b, const Order& order, int64_t sample, int64_t at, A (&to_a)[kStep],
                     A (&to_b)[kStep]) {
  const Step<A> step_a = load<A>(a, order, sample, at), step_b = load<A>(b, order, sample, at);
  step_a.convert(A(0), to_a);
  step_b.convert(A(0), to_b);
}

}  // namespace kdfast
