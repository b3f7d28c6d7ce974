// Vectorised loops over a piece of a row. Tail: the remainder is processed by one overlapping vector that ends at n.
// Overlapped lanes are recomputed: their stores are idempotent, and they are masked out of reductions.
#pragma once

#include <cstdint>

#include "common/vector_math.h"

namespace kdfast {

constexpr int64_t kLanes = 16;  // floats in the widest vector

// Elements before the tail. Loops over doubles have no vector tail: their exponentials are scalar calls.
template <class A>
KD_INLINED inline int64_t whole_vectors(int64_t n) {
  return sizeof(A) == 4 && n >= kLanes ? n / kLanes * kLanes : n;
}

// f(i) for the n elements. It is called twice for overlapped lanes, so it has to be idempotent.
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

// Up to seven terms, or their reductions.
template <class A>
struct Terms {
  A a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0;
};

// x, or 0 where the mask is 0; see exp2.
KD_INLINED inline float masked(float x, uint32_t mask) { return bits<float>(bits<uint32_t>(x) & mask); }
KD_INLINED inline double masked(double x, uint32_t mask) { return mask ? x : 0; }

// A reduction: its identity, its operation, and an overlapped lane (mask 0), which must not count twice.
template <class A>
struct Sum {
  KD_INLINED static A start() { return 0; }
  KD_INLINED static A of(A x, A y) { return x + y; }
  KD_INLINED static A once(A x, uint32_t mask) { return masked(x, mask); }
};

template <class A>
struct Largest {
  KD_INLINED static A start() { return -infinity<A>(); }
  KD_INLINED static A of(A x, A y) { return y > x ? y : x; }
  KD_INLINED static A once(A x, uint32_t) { return x; }
};

// Halves folded onto halves, in registers: nothing is written back to the lanes.
template <class Fold, class A>
KD_INLINED inline A fold_lanes(const A* lanes) {
  constexpr int kHalf = kLanes / 2, kQuarter = kLanes / 4;
  static_assert(kQuarter == 4, "a quarter is folded by hand");
  A half[kHalf], quarter[kQuarter];
  for (int i = 0; i < kHalf; ++i) half[i] = Fold::of(lanes[i], lanes[i + kHalf]);
  for (int i = 0; i < kQuarter; ++i) quarter[i] = Fold::of(half[i], half[i + kQuarter]);
  return Fold::of(Fold::of(quarter[0], quarter[2]), Fold::of(quarter[1], quarter[3]));
}

// Reduces the first kTerms terms of f(i) -> Terms over the n elements; see `for_elements`. Each lane accumulates its
// own terms, and there are as many lanes on every machine, so the order of sums is fixed. GCC would end a simd
// reduction one lane after another, which takes as long as hundreds of elements.
template <int kTerms, class Fold, class A, class F>
KD_INLINED inline Terms<A> fold_elements(int64_t n, const F& f) {
  alignas(64) A a[kLanes], b[kLanes], c[kLanes], d[kLanes], e[kLanes], sixth[kLanes], seventh[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) a[i] = b[i] = c[i] = d[i] = e[i] = sixth[i] = seventh[i] = Fold::start();
  const auto fold = [&](int64_t i, int32_t lane, uint32_t mask) KD_INLINED {
    const Terms<A> t = f(i);
    a[lane] = Fold::of(a[lane], Fold::once(t.a, mask));
    if (kTerms > 1) b[lane] = Fold::of(b[lane], Fold::once(t.b, mask));
    if (kTerms > 2) c[lane] = Fold::of(c[lane], Fold::once(t.c, mask));
    if (kTerms > 3) d[lane] = Fold::of(d[lane], Fold::once(t.d, mask));
    if (kTerms > 4) e[lane] = Fold::of(e[lane], Fold::once(t.e, mask));
    if (kTerms > 5) sixth[lane] = Fold::of(sixth[lane], Fold::once(t.f, mask));
    if (kTerms > 6) seventh[lane] = Fold::of(seventh[lane], Fold::once(t.g, mask));
  };
  constexpr int32_t lanes = kLanes;
  const int64_t whole = n / kLanes * kLanes, last = n - kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int32_t lane = 0; lane < lanes; ++lane) fold(i + lane, lane, ~0u);
  }
  if (whole_vectors<A>(n) != n) {
    const int32_t done = static_cast<int32_t>(whole - last);
#pragma omp simd
    for (int32_t lane = 0; lane < lanes; ++lane) fold(last + lane, lane, lane < done ? 0u : ~0u);
  } else {
    for (int32_t lane = 0; whole + lane < n; ++lane) fold(whole + lane, lane, ~0u);
  }
  return {fold_lanes<Fold>(a), fold_lanes<Fold>(b),     fold_lanes<Fold>(c),      fold_lanes<Fold>(d),
          fold_lanes<Fold>(e), fold_lanes<Fold>(sixth), fold_lanes<Fold>(seventh)};
}

// Sums of the first kTerms terms.
template <int kTerms, class A, class F>
KD_INLINED inline Terms<A> sum_elements(int64_t n, const F& f) {
  return fold_elements<kTerms, Sum<A>, A>(n, f);
}

// The sum of f(i) -> A over the n elements.
template <class A, class F>
KD_INLINED inline A sum_each(int64_t n, const F& f) {
  return sum_elements<1, A>(n, [&](int64_t i) KD_INLINED { return Terms<A>{f(i)}; }).a;
}

// Maxima, at least -inf.
template <int kTerms, class A, class F>
KD_INLINED inline Terms<A> max_elements(int64_t n, const F& f) {
  return fold_elements<kTerms, Largest<A>, A>(n, f);
}

}  // namespace kdfast
