// Vectors of 64 bytes, for loops that keep several results in registers, where the compiler's own vectoriser does not.
// One register with AVX-512; GCC and Clang split the operations where registers are narrower.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KD_SHUFFLES
#endif
#endif

#if defined(KD_SHUFFLES)
// Of vectors whose runs of kRun lanes are to be added up: the runs of x and then those of y, halved.
template <int kRun, class V, int... J>
KD_HD V halve_runs(const V& x, const V& y, std::integer_sequence<int, J...>) {
  constexpr int n = sizeof...(J), half = kRun / 2;
  const V first = __builtin_shufflevector(x, y, (J / half * kRun + J % half)...);
  const V second = __builtin_shufflevector(x, y, (J / half * kRun + J % half + half)...);
  static_assert(n % kRun == 0, "runs fill a vector");
  return first + second;
}

template <int kRun, int kVectors, class V, class Indices>
KD_HD void add_runs(V* v, Indices indices) {
  if constexpr (kRun > 1) {
    for (int i = 0; i < kVectors / 2; ++i) v[i] = halve_runs<kRun>(v[2 * i], v[2 * i + 1], indices);
    add_runs<kRun / 2, kVectors / 2>(v, indices);
  }
}
#endif

// lane_sum of each of kVectors vectors, a multiple of their lanes: in a third of the instructions.
template <class A, int kVectors>
KD_HD void lane_sums(const Lanes<A>* v, A* sums) {
#if defined(KD_SHUFFLES)
  using Half = typename LanesOf<A>::half;
  constexpr int kHalf = kLanesOf<A> / 2;
  Half runs[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    Half h[2];
    memcpy(h, &v[i], sizeof(h));
    runs[i] = h[0] + h[1];
  }
  add_runs<kHalf, kVectors>(runs, std::make_integer_sequence<int, kHalf>{});
  memcpy(sums, runs, kVectors * sizeof(A));
#else
  for (int i = 0; i < kVectors; ++i) sums[i] = lane_sum<A>(v[i]);
#endif
}

}  // namespace kdfast
