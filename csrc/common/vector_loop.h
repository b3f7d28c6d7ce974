// Loops over a piece of a row that stay vectorised to its end. What is left after the last whole vector is done in one
// more vector that ends with the piece: its first elements are done twice, written the same and added up once.
#pragma once

#include <cstdint>

#include "common/vector_math.h"

namespace kdfast {

constexpr int64_t kLanes = 16;  // floats in the widest vector

// How many of n elements come before the last vector. Doubles are not worth one: their exponentials are calls.
template <class A>
KD_INLINED inline int64_t whole_vectors(int64_t n) {
  return sizeof(A) == 4 && n >= kLanes ? n / kLanes * kLanes : n;
}

// f(i) for the n elements; it may be called twice, and then does the same twice.
template <class A, class F>
KD_INLINED inline void for_elements(int64_t n, const F& f) {
  const int64_t whole = whole_vectors<A>(n), last = n - kLanes;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) f(i);
  if (whole == n) return;
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) f(last + i);
}

// f(i, x) -> the new x[i], from the old one.
template <class A, class F>
KD_INLINED inline void update_elements(A* x, int64_t n, const F& f) {
  const int64_t whole = whole_vectors<A>(n), last = n - kLanes;
  A old[kLanes];
  if (whole != n) memcpy(old, x + last, sizeof(old));
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) x[i] = f(i, x[i]);
  if (whole == n) return;
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) x[last + i] = f(last + i, old[i]);
}

// Up to five terms, of sums or maxima, or these.
template <class A>
struct Terms {
  A a = 0, b = 0, c = 0, d = 0, e = 0;
};

// x, or 0 where the mask is; see exp2.
KD_INLINED inline float masked(float x, uint32_t mask) { return bits<float>(bits<uint32_t>(x) & mask); }
KD_INLINED inline double masked(double x, uint32_t mask) { return mask ? x : 0; }

// Sums of the first kSums terms of f(i) -> Terms over the n elements; like `for_elements`.
template <int kSums, class A, class F>
KD_INLINED inline Terms<A> sum_elements(int64_t n, const F& f) {
  const int64_t whole = whole_vectors<A>(n), last = n - kLanes;
  A a = 0, b = 0, c = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, b, c, d, e)
  for (int64_t i = 0; i < whole; ++i) {
    const Terms<A> t = f(i);
    a += t.a;
    if (kSums > 1) b += t.b;
    if (kSums > 2) c += t.c;
    if (kSums > 3) d += t.d;
    if (kSums > 4) e += t.e;
  }
  if (whole == n) return {a, b, c, d, e};
  const int32_t done = static_cast<int32_t>(whole - last);
#pragma omp simd reduction(+ : a, b, c, d, e)
  for (int32_t i = 0; i < static_cast<int32_t>(kLanes); ++i) {
    const uint32_t mask = i < done ? 0u : ~0u;
    const Terms<A> t = f(last + i);
    a += masked(t.a, mask);
    if (kSums > 1) b += masked(t.b, mask);
    if (kSums > 2) c += masked(t.c, mask);
    if (kSums > 3) d += masked(t.d, mask);
    if (kSums > 4) e += masked(t.e, mask);
  }
  return {a, b, c, d, e};
}

// Maxima of the first kMany terms, up to four, of f(i) -> Terms over the n elements, at least -inf; like
// `for_elements`.
template <int kMany, class A, class F>
KD_INLINED inline Terms<A> max_elements(int64_t n, const F& f) {
  const int64_t whole = whole_vectors<A>(n), last = n - kLanes;
  A a = -infinity<A>(), b = a, c = a, d = a;
#pragma omp simd reduction(max : a, b, c, d)
  for (int64_t i = 0; i < whole; ++i) {
    const Terms<A> t = f(i);
    a = t.a > a ? t.a : a;
    if (kMany > 1) b = t.b > b ? t.b : b;
    if (kMany > 2) c = t.c > c ? t.c : c;
    if (kMany > 3) d = t.d > d ? t.d : d;
  }
  if (whole == n) return {a, b, c, d, 0};
#pragma omp simd reduction(max : a, b, c, d)
  for (int64_t i = 0; i < kLanes; ++i) {
    const Terms<A> t = f(last + i);
    a = t.a > a ? t.a : a;
    if (kMany > 1) b = t.b > b ? t.b : b;
    if (kMany > 2) c = t.c > c ? t.c : c;
    if (kMany > 3) d = t.d > d ? t.d : d;
  }
  return {a, b, c, d, 0};
}

}  // namespace kdfast
