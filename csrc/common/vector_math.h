// exp2 and log2 that a compiler can vectorise on the host, and the device's own on CUDA.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace kdfast {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A>
KD_HD A infinity() {
  return static_cast<A>(INFINITY);
}

template <class A>
KD_HD A not_a_number() {
  return static_cast<A>(NAN);
}

template <class A>
KD_HD A smallest_normal() {
  return static_cast<A>(sizeof(A) == 8 ? DBL_MIN : FLT_MIN);
}

template <class To, class From>
KD_HD To bits(From x) {
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// 2^x for x <= 1: every use here is of a value below its maximum, up to rounding. 0 below the smallest normal number,
// exactly 1 at 0, NaN of NaN. Error 1.5 ulp (minimax polynomial of degree 5 on |x - round(x)| <= 1/2).
KD_HD float exp2(float x) {
#if defined(__CUDA_ARCH__)
  return ::exp2f(x);
#else
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float f = x - (shifted - 12582912.0f);
  float p = 1.32647204e-3f;
  p = p * f + 9.67151302e-3f;
  p = p * f + 5.55073378e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  const uint32_t y = bits<uint32_t>(p) + (bits<uint32_t>(shifted) << 23);  // adds the integer to the exponent
  const uint32_t kept = x < -126.0f ? 0u : ~0u;  // a mask: of a choice between two floats GCC 12 makes branches
  return bits<float>(y & kept);
#endif
}

// log2(x) for a normal, finite x > 0; exactly 0 at 1. Error 2 ulp (minimax polynomial of degree 8 for log2(1 + f) / f).
KD_HD float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  return ::log2f(x);
#else
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const int32_t n = static_cast<int32_t>(bits<uint32_t>(x) - 0x3f3504f3u) >> 23;
  const float f = bits<float>(bits<uint32_t>(x) - (static_cast<uint32_t>(n) << 23)) - 1.0f;
  float p = 0.12583388f;
  p = p * f - 0.207261111f;
  p = p * f + 0.215712614f;
  p = p * f - 0.238946145f;
  p = p * f + 0.287916808f;
  p = p * f - 0.360703625f;
  p = p * f + 0.480910615f;
  p = p * f - 0.721347347f;
  p = p * f + 1.442695f;
  return p * f + static_cast<float>(n);
#endif
}

KD_HD double exp2(double x) { return ::exp2(x); }
KD_HD double fast_log2(double x) { return ::log2(x); }
KD_HD float log2(float x) { return ::log2f(x); }
KD_HD double log2(double x) { return ::log2(x); }

// a / b for 0 < b < 2^126 (2 ulp on CUDA, without the call that would spill registers).
KD_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
KD_HD double divide(double a, double b) { return a / b; }

template <class A>
KD_HD A max(A a, A b) {
  return a > b ? a : b;
}

}  // namespace kdfast
