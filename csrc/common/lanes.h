// Vectors, for loops that keep several results in registers, where the compiler's own vectoriser does not.
//
// A Register is one of the processor's. Lanes are 64 bytes on every processor: sums that are kept in lanes have the
// same order everywhere. Code that needs many registers at once goes through the registers of lanes one after another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/macros.h"

namespace kdfast {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32, kRegisters = 16;
#else
constexpr int kRegisterBytes = 16, kRegisters = 16;
#endif

template <class A>
struct VectorsOf {
  typedef A whole __attribute__((vector_size(kRegisterBytes)));
  typedef A half __attribute__((vector_size(32)));
  typedef A quarter __attribute__((vector_size(16)));
};

template <class A>
using Register = typename VectorsOf<A>::whole;

template <class A>
constexpr int64_t kRegisterOf = kRegisterBytes / sizeof(A);  // elements
template <class A>
constexpr int64_t kLanesOf = 64 / sizeof(A);
constexpr int64_t kParts = 64 / kRegisterBytes;  // registers of lanes

template <class A>
struct Lanes {
  Register<A> part[kParts];

  KD_HD Lanes& operator+=(const Lanes& y) {
    for (int i = 0; i < kParts; ++i) part[i] += y.part[i];
    return *this;
  }
  KD_HD friend Lanes operator+(Lanes x, const Lanes& y) { return x += y; }
  KD_HD friend Lanes operator-(Lanes x, const Lanes& y) {
    for (int i = 0; i < kParts; ++i) x.part[i] -= y.part[i];
    return x;
  }
  KD_HD friend Lanes operator*(Lanes x, const Lanes& y) {
    for (int i = 0; i < kParts; ++i) x.part[i] *= y.part[i];
    return x;
  }
  KD_HD friend Lanes operator*(A scale, Lanes x) {
    for (auto& part : x.part) part *= scale;
    return x;
  }
  KD_HD friend Lanes operator/(Lanes x, A divisor) {
    for (auto& part : x.part) part /= divisor;
    return x;
  }
  KD_HD friend Lanes operator-(Lanes x) {
    for (auto& part : x.part) part = -part;
    return x;
  }
  KD_HD A& operator[](int64_t i) { return reinterpret_cast<A*>(part)[i]; }
  KD_HD A operator[](int64_t i) const { return reinterpret_cast<const A*>(part)[i]; }
};

template <class A>
KD_HD Register<A> load_register(const A* from) {
  Register<A> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
KD_HD void store_register(A* to, const Register<A>& v) {
  memcpy(to, &v, sizeof(v));
}

// Says that v is needed as a register: GCC would read it from memory again for each use.
template <class V>
KD_HD void keep(V& v) {
#if defined(__x86_64__) && defined(__GNUC__)
  __asm__("" : "+v"(v));
#endif
}

// x in every element. Through an array: of a vector expression GCC 12 makes 16 insertions here, of this one
// instruction.
template <class A>
KD_HD Register<A> fill_register(A x) {
  A elements[kRegisterOf<A>];
  for (A& element : elements) element = x;
  return load_register(elements);
}

template <class A>
KD_HD Lanes<A> load(const A* from) {
  Lanes<A> v;
  for (int i = 0; i < kParts; ++i) v.part[i] = load_register(from + i * kRegisterOf<A>);
  return v;
}

template <class A>
KD_HD void store(A* to, const Lanes<A>& v) {
  for (int i = 0; i < kParts; ++i) store_register<A>(to + i * kRegisterOf<A>, v.part[i]);
}

template <class A>
KD_HD Lanes<A> all(A x) {
  Lanes<A> v;
  for (auto& part : v.part) part = fill_register(x);
  return v;
}

// Halves added to halves: a fixed order, and few instructions.
template <class A>
KD_HD A lane_sum(const Lanes<A>& v) {
  typename VectorsOf<A>::half h[2];
  memcpy(h, &v, sizeof(v));
  h[0] += h[1];
  typename VectorsOf<A>::quarter q[2];
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
  using Half = typename VectorsOf<A>::half;
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

// sums[a][b] = the sum of `add` over n columns of the rows x[a] and y[b], n a multiple of the lanes: add(sum, x, y)
// gives the next sum of registers.
constexpr int64_t kTileRows = 4;

template <class A, class F>
KD_HD void tile_sums(const A* const (&x)[kTileRows], const A* const (&y)[kTileRows], int64_t n, const F& add,
                     A (&sums)[kTileRows][kTileRows]) {
  constexpr int64_t kAtOnce = kRegisters == 32 ? kTileRows : kTileRows / 2;  // rows of y whose sums fit into registers
  Lanes<A> lanes[kTileRows][kTileRows];
  for (int64_t part = 0; part < kParts; ++part) {
    for (int64_t b0 = 0; b0 < kTileRows; b0 += kAtOnce) {
      Register<A> sum[kTileRows][kAtOnce] = {};
      for (int64_t c = part * kRegisterOf<A>; c < n; c += kLanesOf<A>) {
        Register<A> other[kAtOnce];
        for (int64_t b = 0; b < kAtOnce; ++b) other[b] = load_register(y[b0 + b] + c);
        for (int64_t a = 0; a < kTileRows; ++a) {
          Register<A> own = load_register(x[a] + c);
          keep(own);
          for (int64_t b = 0; b < kAtOnce; ++b) sum[a][b] = add(sum[a][b], own, other[b]);
        }
      }
      for (int64_t a = 0; a < kTileRows; ++a) {
        for (int64_t b = 0; b < kAtOnce; ++b) lanes[a][b0 + b].part[part] = sum[a][b];
      }
    }
  }
  lane_sums<A, kTileRows * kTileRows>(lanes[0], sums[0]);
}

}  // namespace kdfast
