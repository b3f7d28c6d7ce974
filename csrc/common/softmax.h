// The softmax of a row of logits at temperature T, and KL(p || q) of two of them.
//
// A softmax is kept as max = max_j z_j and sum = sum_j exp((z_j - max) / T); sum = 0 marks a row that is -inf
// everywhere. With the centred logit c = z - max and e = exp(c / T): probability e / sum, log-probability
// c / T - log sum, and
//   KL(p || q) = sum_j e_p (c_p - c_q) / (T sum_p) - (log sum_p - log sum_q).
// Loops work in bits, because 2^x is cheaper than e^x: e = 2^(c rate) with rate = log2(e) / T. Results are in nats.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include <type_traits>

#include "common/vector_math.h"

namespace kdfast {

template <class A>
KD_HD bool is_masked(A z) {
  return z == -infinity<A>();
}

// (-inf) - (-inf) would be NaN, so a row that is masked everywhere is centred at 0.
template <class A>
KD_HD A finite_max(A max) {
  return is_masked(max) ? A(0) : max;
}

template <class A>
struct Softmax {
  A max, sum;

  KD_HD A scaled(A z, A rate) const { return (z - max) * rate; }
  KD_HD A inverse() const { return sum == 0 ? A(0) : divide(A(1), sum); }
  KD_HD A log2_sum() const { return sum == 0 ? infinity<A>() : log2(sum); }
};

// Log-probabilities in bits: log2 p = (z - max) rate - log2_sum; p = e inverse.
template <class A>
struct LogSoftmax {
  A max, rate, log2_sum, inverse;

  KD_HD LogSoftmax(Softmax<A> s, A rate) : max(s.max), rate(rate), log2_sum(s.log2_sum()), inverse(s.inverse()) {}
  KD_HD A operator()(A z) const { return (z - max) * rate - log2_sum; }
};

// e_p log(p / q), where 0 log(0 / anything) = 0. Infinite where q alone is 0; compared with == so that NaN stays NaN.
template <class A>
KD_HD A kl_term(A e_p, A log_ratio) {
  return e_p == 0 ? A(0) : e_p * log_ratio;
}

// sum p (log p - log q), or the cross-entropy sum p (-log q), in nats; `dot` is sum e_p (c_p - c_q), or sum e_p (-c_q).
template <class A>
KD_HD A kl_of_sums(A sum_p, A sum_q, A dot, A rate, bool cross = false) {
  if (sum_p == 0) return 0;
  if (sum_q == 0) return infinity<A>();
  const A log2_q = log2(sum_q);
  return A(kLn2) * (rate * divide(dot, sum_p) + (cross ? log2_q : log2_q - log2(sum_p)));
}

// ---- temperature 1 beside T
// e^c for a cross-entropy at temperature 1, from the centred logit c and e = exp(c / T) where T is 1, 2, 3 or 4: a
// power costs less than an exponential. kT = 0 stands for any other T.
template <int kT, class A>
KD_HD A exp_1(A e, A c) {
  if (kT == 1) return e;
  if (kT == 2) return e * e;
  if (kT == 3) return e * e * e;
  if (kT == 4) return (e * e) * (e * e);
  return exp2(c * A(kLog2E));
}

// f(constant kT) with the T of `rate` if it is kFirst or one of kTs, else 0.
template <int kFirst, int... kTs, class A, class F>
auto dispatch_temperature(A rate, const F& f) {
  if (rate == A(kLog2E / kFirst)) return f(std::integral_constant<int, kFirst>{});
  if constexpr (sizeof...(kTs) > 0) {
    return dispatch_temperature<kTs...>(rate, f);
  } else {
    return f(std::integral_constant<int, 0>{});
  }
}

// -log softmax(z)[label] at temperature 1, from sum_j exp(z_j - max) and z[label] - max.
template <class A>
KD_HD A cross_entropy(A sum_1, A at_label) {
  return sum_1 == 0 ? infinity<A>() : A(kLn2) * log2(sum_1) - at_label;
}

// Its gradient in z is this times exp(z - max), less the upstream gradient `ce` at the label.
template <class A>
KD_HD A cross_entropy_coef(A ce, A sum_1) {
  return ce == 0 ? A(0) : ce * Softmax<A>{0, sum_1}.inverse();
}

// ---- near distributions. With d = log(p / q), sum_j p_j (e^-d_j - 1 + d_j) is KL(p || q), as p and q sum to 1. No
// term is negative, so the sum keeps its digits where those of the plain form cancel: rows below kNear, in nats, are
// summed up once more this way.
constexpr double kNear = 1.0 / 256;

// e^-d - 1 + d for |d| <= 1/4.
KD_HD float small_excess(float d) {
  float p = 2.48015873e-5f;
  p = p * d - 1.98412698e-4f;
  p = p * d + 1.38888889e-3f;
  p = p * d - 8.33333333e-3f;
  p = p * d + 4.16666667e-2f;
  p = p * d - 1.66666667e-1f;
  p = p * d + 0.5f;
  return p * (d * d);
}

KD_HD double small_excess(double d) {
  const double excess = ::expm1(-d) + d;
  return excess < 0 ? 0.0 : excess;  // a rounding
}

// log(1 + x) for |x| <= 0.3.
KD_HD float small_log1p(float x) {
  const float t = x / (x + 2.0f), t2 = t * t;
  return 2.0f * t * (1.0f + t2 * (3.33333333e-1f + t2 * (0.2f + t2 * (1.42857143e-1f + t2 * 1.11111111e-1f))));
}
KD_HD double small_log1p(double x) { return ::log1p(x); }

// p (e^-d - 1 + d), d = log(p / q).
template <class A>
KD_HD A near_term(A p, A q, A d) {
  const A plain = (q - p) + p * d;
  return p == 0 ? q : fabs(d) <= A(0.25) ? p * small_excess(d) : plain;
}

// z_p - z_q of a class less that of the maxima. The difference of near logits is exact; beside an offset between the
// networks it would lose the digits that centred logits keep.
template <class A>
KD_HD A centred_gap(A z_p, A z_q, A max_p, A max_q, bool same_logits = true) {
  const A gap = max_p - max_q;
  return same_logits && fabs(gap) <= 1 ? (z_p - z_q) - gap : (z_p - max_p) - (z_q - max_q);
}

// What turns a pair of logits into the term of its class.
template <class A>
struct NearRow {
  A max_p, max_q, inverse_p, inverse_q, log2_ratio, rate;
  bool same_logits;  // both sides have their logits, not centred ones on one side

  // S may be wider than A: the ratio of the sums is what is small.
  template <class S>
  KD_HD NearRow(A max_p, A max_q, S sum_p, S sum_q, A rate, bool same_logits)
      : max_p(max_p),
        max_q(max_q),
        inverse_p(static_cast<A>(divide(S(1), sum_p))),
        inverse_q(static_cast<A>(divide(S(1), sum_q))),
        log2_ratio(static_cast<A>(log2(sum_p) - log2(sum_q))),
        rate(rate),
        same_logits(same_logits) {}

  KD_HD A log_ratio(A z_p, A z_q) const {
    return A(kLn2) * (centred_gap(z_p, z_q, max_p, max_q, same_logits) * rate - log2_ratio);
  }
  KD_HD A p(A z) const { return exp2((z - max_p) * rate) * inverse_p; }
  KD_HD A q(A z) const { return exp2((z - max_q) * rate) * inverse_q; }
  KD_HD A term(A z_p, A z_q) const { return near_term(p(z_p), q(z_q), log_ratio(z_p, z_q)); }
};

}  // namespace kdfast
