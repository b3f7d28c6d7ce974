// Relations between the rows of a batch, all from squared distances p_ij = |x_i - x_j|^2.
//
// RKD compares student and teacher through h, the smooth L1 with beta 1:
//   distance: h(D^s_ij / mu_s - D^t_ij / mu_t), with D = sqrt(max(p, 1e-12)) off the diagonal and mu its mean;
//   angle:    h(cos^s_ijk - cos^t_ijk), the cosine at vertex i of the triangle of rows i, j, k.
// By the law of cosines, with d = 1 / sqrt(p) (0 where p = 0: no direction, no gradient),
//   cos_ijk = (p_ij + p_ik - p_jk) d_ij d_ik / 2,
//   dcos/dp_jk = -d_ij d_ik / 2,    dcos/dp_ij = d_ij d_ik / 2 - cos d_ij^2 / 2,
// so gradients are one matrix dL/dp, and dL/dx_i = sum_j 2 dL/dp_ij (x_i - x_j).
// V is a scalar, or a vector of them. Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/vector_math.h"

namespace kdfast {
namespace pairwise {

constexpr double kSmallest = 1e-12;  // smallest squared distance between two rows in the distance loss

// min(a, b) with the rule of the instruction for it: NaN if b is NaN.
template <class V>
KD_HD V smaller(V a, V b) {
  return a < b ? a : b;
}

// h'(x), and h(x) from it: x^2 / 2 while |x| < 1, |x| - 1/2 beyond.
template <class V>
KD_HD V huber_slope(V x, V one) {
  const V below = smaller(one, x), least = -one;
  return least > below ? least : below;
}

template <class V>
KD_HD V huber(V x, V slope, V half) {
  return slope * (x - slope * half);
}

// A squared distance as the sum of two numbers, of which lo is below the rounding of hi: for close rows far from the
// others, p_ij + p_ik - p_jk is left with few digits of a float32. A float64 needs no lo.
template <class V>
struct Squared {
  V hi, lo;
};

// cos_ijk from d_ij d_ik / 2. The difference of the two large squares comes first. Rounding may pass 1; held there, the
// product is also a number of its own, which no compiler fuses with the subtraction of another cosine: that is exactly
// 0 where student and teacher agree.
template <class V>
KD_HD V cosine(const Squared<V>& ij, const Squared<V>& ik, const Squared<V>& jk, V half_product, V one) {
  const auto first = ij.hi > ik.hi;
  const V hi = first ? ij.hi : ik.hi, lo = first ? ij.lo : ik.lo, other = first ? ik.hi : ij.hi;
  return smaller(one, (((hi - jk.hi) + (lo - jk.lo)) + other) * half_product);
}

// D^s / mu_s - D^t / mu_t of one pair; `ratio` is mu_s / mu_t. Exactly 0 where student and teacher agree.
template <class V>
KD_HD V distance_gap(V d_s, V d_t, V inverse_mu, V ratio) {
  return (d_s - d_t * ratio) * inverse_mu;
}

template <class A>
KD_HD A floored_distance(A p) {
  return std::sqrt(p < A(kSmallest) ? A(kSmallest) : p);  // a NaN stays one
}

}  // namespace pairwise
}  // namespace kdfast
