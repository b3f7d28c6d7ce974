// Vectors of 64 bytes, for loops that keep several results in registers, where the compiler's own vectoriser does not.
// One register with AVX-512; GCC and Clang split the operations where registers are narrower.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace kdfast {

template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(64)));
  typedef A half __attribute__((vector_size(32)));
  typedef A quarter __attribute__((vector_size(16)));
};

template <class A>
using Lanes = typename LanesOf<A>::type;

template <class A>
constexpr int64_t kLanesOf = 64 / sizeof(A);

template <class A>
KD_HD Lanes<A> load(const A* from) {
  Lanes<A> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
KD_HD void store(A* to, const Lanes<A>& v) {
  memcpy(to, &v, sizeof(v));
}

// x in every lane. Through an array: of a vector expression GCC 12 makes 16 insertions here, of this one instruction.
template <class A>
KD_HD Lanes<A> all(A x) {
  A lanes[kLanesOf<A>];
  for (A& lane : lanes) lane = x;
  return load(lanes);
}

// Halves added to halves: a fixed order, and few instructions.
template <class A>
KD_HD A lane_sum(const Lanes<A>& v) {
  typename LanesOf<A>::half h[2];
  memcpy(h, &v, sizeof(v));
  h[0] += h[1];
  typename LanesOf<A>::quarter q[2];
  memcpy(q, &h[0], sizeof(q));
  q[0] += q[1];
  A sum = q[0][0] + q[0][1];
  if constexpr (sizeof(A) == 4) sum += q[0][2] + q[0][3];
  return sum;
}

}  // namespace kdfast
