// Attention maps of one sample x [channels, positions], with M the sum over channels:
//   M_n = sum_c x_cn^p,    q = M / |M|,    loss = 1 / (B N) sum_n (q_n - q'_n)^2,    q' the teacher's,
//   dL/dx_cn = p x_cn^(p-1) dL/dM_n,    dL/dM = (d - q (q . d)) / |M|,    d = dL/dq = 2 / (B N) (q - q').
// |M| is at least 1e-12 times the number of channels; a norm at that floor is a constant, without the term q . d.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include <type_traits>

#include "common/vector_math.h"

namespace kdfast {
namespace attention {

constexpr double kSmallestMean = 1e-12;  // norm of M over the channels

// x^P, or x^p where P is 0.
template <int P, class A>
KD_HD A power(A x, int64_t p) {
  if constexpr (P == 1) return x;
  if constexpr (P == 2) return x * x;
  A y = x;
  for (int64_t i = 1; i < (P ? P : p); ++i) y *= x;
  return p == 0 ? A(1) : y;
}

// f(std::integral_constant) with P: the exponents of papers are compiled, others loop.
template <class F>
KD_HD void dispatch_power(int64_t p, const F& f) {
  switch (p) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 0>{});
  }
}

// The norms of a sample's two maps, as what both sides need of them.
template <class A>
struct Norms {
  A inverse_s, inverse_t, ratio;  // |M_s| / |M_t|
  bool floored_s, floored_t;

  KD_HD Norms(double square_s, double square_t, int64_t channels_s, int64_t channels_t) {
    const double floor_s = kSmallestMean * channels_s, floor_t = kSmallestMean * channels_t;
    const double norm_s = std::sqrt(square_s), norm_t = std::sqrt(square_t);
    floored_s = norm_s <= floor_s;
    floored_t = norm_t <= floor_t;
    const double s = floored_s ? floor_s : norm_s, t = floored_t ? floor_t : norm_t;
    inverse_s = static_cast<A>(1 / s);
    inverse_t = static_cast<A>(1 / t);
    ratio = static_cast<A>(s / t);
  }

  // q_s - q_t. The difference comes before the scale: exactly 0 between equal maps, however the compiler contracts.
  KD_HD A gap(A m_s, A m_t) const { return (m_s - m_t * ratio) * inverse_s; }
};

// dL/dM of one side from its own q and the gap to the other side, without the factor 2 / (B N); `along` is q . gap.
template <class A>
KD_HD A slope(A q, A gap, A along, A inverse) {
#if defined(__CUDA_ARCH__)
  return ::fma(-q, along, gap) *
         inverse;  // the compiler may fuse it in one of two copies of a loop, and not in the other
#else
  return (gap - q * along) * inverse;
#endif
}

}  // namespace attention
}  // namespace kdfast
