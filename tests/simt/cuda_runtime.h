// Stands in for the CUDA runtime when a .cu source is compiled by a C++ compiler with -DKD_SIMT: the qualifiers, the
// indices and the device functions that kernels may use. What a call means is in simt.h; numbers are computed in
// functions of the C++ library, so that they are as good as CUDA's or better.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "simt.h"
#include "vector_types.h"

#if defined(__SANITIZE_THREAD__)
// All is inlined: g++ announces no store of a struct that a called function returns.
#define __global__ __attribute__((flatten))
#else
#define __global__
#endif
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
constexpr int warpSize = simt::kWarp;

// ---- barriers
inline void __syncthreads(simt::Place at = simt::here()) { simt::block_barrier(at); }
inline void __syncwarp(unsigned mask = ~0u, simt::Place at = simt::here()) { simt::warp_barrier(mask, at); }
inline void __threadfence() { simt::fence(); }

// ---- between the lanes of a warp
namespace simt {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(From) <= sizeof(To) || sizeof(To) <= sizeof(From));
  To to{};
  memcpy(&to, &from, std::min(sizeof(to), sizeof(from)));
  return to;
}

inline int lane() { return thread_index().x % kWarp; }

// The value of lane `source` among `width` neighbours, where `inside` says that there is such a lane; else one's own.
template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, bool inside, Place at) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "what CUDA shuffles: up to 8 bytes");
  const Lanes& lanes = collective(what, mask, bits<uint64_t>(value), at);
  if (!inside) return value;
  if (!(lanes.present >> source & 1)) fail_absent(what, source);
  return bits<T>(lanes.value[source]);
}

template <class T, class Op>
T reduce(const char* what, unsigned mask, T value, Op op, Place at) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4, "what CUDA reduces: 32-bit integers");
  const Lanes& lanes = collective(what, mask, bits<uint64_t>(value), at);
  for (int i = 0; i < int(kWarp); ++i) {
    if (i != lane() && lanes.present >> i & 1) value = op(value, bits<T>(lanes.value[i]));
  }
  return value;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Place at = simt::here()) {
  const int first = simt::lane() / width * width;
  return simt::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), true, at);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place at = simt::here()) {
  const int source = simt::lane() - int(delta), first = simt::lane() / width * width;
  return simt::shuffle("__shfl_up_sync", mask, value, source, source >= first, at);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place at = simt::here()) {
  const int source = simt::lane() + int(delta), end = (simt::lane() / width + 1) * width;
  return simt::shuffle("__shfl_down_sync", mask, value, source, source < end, at);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Place at = simt::here()) {
  const int source = simt::lane() ^ lane_mask, end = (simt::lane() / width + 1) * width;
  return simt::shuffle("__shfl_xor_sync", mask, value, source, source < end, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Place at = simt::here()) {
  const unsigned bit = predicate ? 1u << simt::lane() : 0u;
  return simt::reduce("__ballot_sync", mask, bit, [](unsigned a, unsigned b) { return a | b; }, at);
}

inline int __any_sync(unsigned mask, int predicate, simt::Place at = simt::here()) {
  return simt::reduce("__any_sync", mask, int(predicate != 0), [](int a, int b) { return a | b; }, at);
}

inline int __all_sync(unsigned mask, int predicate, simt::Place at = simt::here()) {
  return simt::reduce("__all_sync", mask, int(predicate != 0), [](int a, int b) { return a & b; }, at);
}

#define SIMT_REDUCE(name, expression)                                                      \
  template <class T>                                                                       \
  T name(unsigned mask, T value, simt::Place at = simt::here()) {                          \
    return simt::reduce(#name, mask, value, [](T a, T b) -> T { return expression; }, at); \
  }
SIMT_REDUCE(__reduce_add_sync, a + b)
SIMT_REDUCE(__reduce_min_sync, std::min(a, b))
SIMT_REDUCE(__reduce_max_sync, std::max(a, b))
SIMT_REDUCE(__reduce_and_sync, a& b)
SIMT_REDUCE(__reduce_or_sync, a | b)
SIMT_REDUCE(__reduce_xor_sync, a ^ b)
#undef SIMT_REDUCE

// ---- atomics: each returns the old value
namespace simt {

template <class T>
struct Same {
  using type = T;
};

template <class T, class F>
T update(T* at, F f) {
  T old;
  atomic_load(at, &old, sizeof(T));
  const T value = f(old);
  atomic_store(at, &value, sizeof(T));
  return old;
}

}  // namespace simt

#define SIMT_ATOMIC(name, condition, expression)                     \
  template <class T>                                                 \
  T name(T* at, typename simt::Same<T>::type value) {                \
    static_assert(condition, #name " of this type is not CUDA's");   \
    return simt::update(at, [=](T old) -> T { return expression; }); \
  }
SIMT_ATOMIC(atomicAdd, std::is_arithmetic<T>::value && sizeof(T) >= 4, old + value)
SIMT_ATOMIC(atomicSub, std::is_integral<T>::value && sizeof(T) == 4, old - value)
SIMT_ATOMIC(atomicExch, sizeof(T) == 4 || sizeof(T) == 8, value)
SIMT_ATOMIC(atomicMin, std::is_integral<T>::value && sizeof(T) >= 4, std::min(old, value))
SIMT_ATOMIC(atomicMax, std::is_integral<T>::value && sizeof(T) >= 4, std::max(old, value))
SIMT_ATOMIC(atomicInc, (std::is_same<T, unsigned>::value), old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicAnd, std::is_integral<T>::value && sizeof(T) >= 4, old& value)
SIMT_ATOMIC(atomicOr, std::is_integral<T>::value && sizeof(T) >= 4, old | value)
SIMT_ATOMIC(atomicXor, std::is_integral<T>::value && sizeof(T) >= 4, old ^ value)
#undef SIMT_ATOMIC

template <class T>
T atomicCAS(T* at, typename simt::Same<T>::type expected, typename simt::Same<T>::type value) {
  static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "atomicCAS of this type is not CUDA's");
  return simt::update(at, [=](T old) { return old == expected ? value : old; });
}

// ---- cached loads and stores
#define SIMT_LOAD(name) \
  template <class T>    \
  T name(const T* at) { \
    return *at;         \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
#undef SIMT_LOAD

#define SIMT_STORE(name)                                 \
  template <class T>                                     \
  void name(T* at, typename simt::Same<T>::type value) { \
    *at = value;                                         \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
#undef SIMT_STORE

// ---- numbers
using std::max;
using std::min;

// glibc declares functions of these names, and has none.
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __powf powf
#define __sinf sinf
#define __cosf cosf

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
