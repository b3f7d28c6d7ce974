// Divergences of two rows p and q that are sums of a term F(log p, log q) over the classes. Forward beside gradient:
// the terms come with their slopes g_p = dF / d log p and g_q = dF / d log q, and with G the sum of g over the row
//   T_q dL/dz_q = g_q - q G_q,    T_p dL/dz_p = g_p - p G_p.
// A multiple of p in g_p, or of q in g_q, adds nothing: the slopes below are those that do not cancel where p is near
// q. Notation of common/softmax.h; d = log(p / q) in nats. Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/softmax.h"

namespace kdfast {
namespace divergence {

enum Kind : int64_t { kSkewed, kVariation, kAlphaBeta, kCrossEntropy };

constexpr double kStdEps = 1e-7;  // of a standardised row, beside its std

// One class of a row.
template <class A>
struct Point {
  A p, q, log2_p, log2_q, d;
};

template <class A>
struct Term {
  A value, to_p, to_q;
};

// x where the mask is ~0, 0 where it is 0.
KD_HD float where(uint32_t mask, float x) { return bits<float>(bits<uint32_t>(x) & mask); }
KD_HD double where(uint32_t mask, double x) { return mask ? x : 0; }

// What turns a pair of logits into a Point. Of equal temperatures d comes from the difference of the logits: that of
// near ones is exact, if their maxima are near, too. What depends on the row alone is made beforehand: a choice in a
// loop keeps it from vectors.
template <class A>
struct Sides {
  LogSoftmax<A> p, q;
  A from_p, from_q, gap, ratio, per;  // rate of q to that of p

  KD_HD Sides(LogSoftmax<A> p, LogSoftmax<A> q)
      : p(p), q(q), ratio(p.log2_sum - q.log2_sum), per(p.rate == q.rate ? A(1) : q.rate / p.rate) {
    const bool near = p.rate == q.rate && fabs(p.max - q.max) <= 1;
    from_p = near ? A(0) : p.max;
    from_q = near ? A(0) : q.max;
    gap = near ? p.max - q.max : A(0);
  }

  KD_HD bool both() const { return p.inverse > 0 && q.inverse > 0; }
  KD_HD bool is_nan() const { return p.log2_sum != p.log2_sum || q.log2_sum != q.log2_sum; }

  KD_HD Point<A> at(A z_p, A z_q) const {
    Point<A> x = of_logs(z_p, z_q);
    x.p = exp2(x.log2_p);
    x.q = exp2(x.log2_q);
    return x;
  }

  // The same, from the exponentials of the centred logits.
  KD_HD Point<A> at(A z_p, A z_q, A e_p, A e_q) const {
    Point<A> x = of_logs(z_p, z_q);
    x.p = e_p * p.inverse;
    x.q = e_q * q.inverse;
    return x;
  }

 private:
  KD_HD Point<A> of_logs(A z_p, A z_q) const {
    const A d = (((z_p - from_p) - (z_q - from_q) * per) - gap) * p.rate - ratio;
    return {0, 0, p(z_p), q(z_q), A(kLn2) * d};
  }
};

// A class that is impossible on both sides adds nothing. A row with a NaN has terms of no meaning: it is seen in its
// sums of exponentials.
template <class A>
KD_HD bool is_nowhere(const Point<A>& x) {
  return x.d != x.d;
}

// 2^x of any x.
template <class A>
KD_HD A any_exp2(A x) {
  return x >= A(127) ? infinity<A>() : exp2(x);
}

// e^-x - 1 + x and e^-x - 1.
template <class A>
KD_HD A excess(A x) {
  return fabs(x) <= A(0.25) ? small_excess(x) : any_exp2(x * A(-kLog2E)) - A(1) + x;
}

template <class A>
KD_HD A exp_minus_1(A x) {
  return fabs(x) <= A(0.25) ? small_excess(x) - x : any_exp2(x * A(-kLog2E)) - A(1);
}

// log(m / p) and m / p - 1 - log(m / p) of a mixture m: where `small`, from near = m / p - 1, else from far = m / p.
template <class A>
struct LogMixture {
  A log, excess;
};

// m / p = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): f - log(1 + f) is f^2 times a polynomial (minimax, error 2
// ulp), and so is the excess where n = 0, which has nothing to cancel then.
KD_HD LogMixture<float> log_mixture(bool small, float near, float far) {
  const int32_t exponent = static_cast<int32_t>(bits<uint32_t>(far) - 0x3f3504f3u) >> 23, n = small ? 0 : exponent;
  const float scaled = bits<float>(bits<uint32_t>(far) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float f = small ? near : scaled;
  float p = 7.77801722e-2f;
  p = p * f - 0.12777324f;
  p = p * f + 0.13114041f;
  p = p * f - 0.141961470f;
  p = p * f + 0.166270927f;
  p = p * f - 0.200016364f;
  p = p * f + 0.250007778f;
  p = p * f - 0.333333254f;
  p = p * f + 0.5f;
  const float part = p * (f * f), log = static_cast<float>(n) * static_cast<float>(kLn2) + (f - part);
  return {log, n == 0 ? part : (far - 1.0f) - log};
}

KD_HD LogMixture<double> log_mixture(bool small, double near, double far) {
  const double log = small ? ::log1p(near) : ::log(far), excess = (small ? near : far - 1) - log;
  return {log, excess < 0 ? 0.0 : excess};  // a rounding
}

// a KL(p || m) + b KL(q || m), m = of_p p + of_q q. Which terms there are, and whether m is p or q, is known when a
// loop is compiled, or (kAny) told by the numbers.
enum Which { kAny, kOfP, kOfQ, kOfBoth };
enum Mixture { kAnyMixture, kIsP, kIsQ, kBetween };

template <class A, Which kWhich, Mixture kMixture>
struct Skewed {
  A a, b, of_p, of_q;
  uint32_t both = ~0u;  // neither side of the row is empty

  KD_HD Term<A> operator()(const Point<A>& x) const {
    const bool is_p = kMixture == kAnyMixture ? of_q == 0 : kMixture == kIsP,
               is_q = kMixture == kAnyMixture ? of_p == 0 : kMixture == kIsQ;
    const A m = of_p * x.p + of_q * x.q, least = smallest_normal<A>(), gap = x.p - x.q;
    const A inverse = divide(A(1), m < least ? least : m), cross = of_p * of_q * gap * inverse;
    Term<A> term{0, 0, 0};
    if (kWhich == kAny ? a != 0 : kWhich != kOfQ) {
      const Side side = of(x.p, x.q, x.d, m, of_q, is_q);
      term.value += a * side.value;
      term.to_p += x.p < least ? A(0) : a * x.p * (side.log_ratio - cross);
      term.to_q -= a * of_q * of_q * gap * (is_q ? A(1) : x.q * inverse);
    }
    if (kWhich == kAny ? b != 0 : kWhich != kOfP) {
      const Side side = of(x.q, x.p, -x.d, m, of_p, is_p);
      term.value += b * side.value;
      term.to_q += x.q < least ? A(0) : b * x.q * (side.log_ratio + cross);
      term.to_p += b * of_p * of_p * gap * (is_p ? A(1) : x.p * inverse);
    }
    return term;
  }

  // skew: of the row, if it has one of its own; else below 0.
  KD_HD void set_row(double skew, bool both_sides) {
    both = both_sides ? ~0u : 0u;
    if (!(skew >= 0)) return;
    of_p = A(skew);
    of_q = A(1 - skew);
  }

 private:
  // A term of KL(p || m), and log(p / m).
  struct Side {
    A value, log_ratio;
  };

  // is_other: m is `other`, whose share it has.
  KD_HD Side of(A p, A other, A d, A m, A share, bool is_other) const {
    if (kMixture == kIsP || kMixture == kIsQ) return of_other(p, other, d);
    const bool small = fabs(d) <= A(0.25);
    const LogMixture<A> mixed = log_mixture(small, share * (small_excess(d) - d), m * divide(A(1), p));
    const Side side{term(p, m, mixed.excess, -mixed.log), -mixed.log};
    if (kMixture == kBetween) return side;
    if (share == 0) return {0, 0};
    const Side whole = of_other(p, other, d);
    return {is_other ? whole.value : side.value, is_other ? whole.log_ratio : side.log_ratio};
  }

  KD_HD Side of_other(A p, A other, A d) const {
    return {where(both, near_term(p, other, d)) + where(~both, kl_term(p, d)), d};
  }

  // Where both rows are distributions, terms of which none is negative: their sum is the KL, and keeps its digits. What
  // is less than a normal number counts as 0: its inverse may be infinite.
  KD_HD A term(A p, A m, A excess, A log_ratio) const {
    return p < smallest_normal<A>() ? where(both, m) : p * (where(both, excess) + where(~both, log_ratio));
  }
};

// |p - q| / 2; its slope is 0 where p = q.
template <class A>
struct Variation {
  KD_HD Term<A> operator()(const Point<A>& x) const {
    const A e = fabs(x.d), larger = x.p > x.q ? x.p : x.q, side = x.d > 0 ? A(0.5) : x.d < 0 ? A(-0.5) : x.d;
    const A near = larger * (e - small_excess(e)), far = fabs(x.p - x.q);
    return {A(0.5) * (e <= A(0.25) ? near : far), x.p * side, -x.q * side};
  }

  KD_HD void set_row(double, bool) {}
};

// The alpha-beta divergence with exponents a and b, or its limits. kUnknown: what a and b say.
enum Exponents { kUnknown, kGeneral, kOnlyA, kOnlyB, kOpposite, kNone };

template <class A, Exponents kExponents>
struct AlphaBeta {
  A a, b;

  KD_HD Exponents exponents() const {
    if (kExponents != kUnknown) return kExponents;
    if (a == 0) return b == 0 ? kNone : kOnlyB;
    return b == 0 ? kOnlyA : a + b == 0 ? kOpposite : kGeneral;
  }

  KD_HD Term<A> operator()(const Point<A>& x) const {
    if (exponents() == kNone) return {x.d * x.d / 2, x.d, -x.d};
    if (exponents() == kOpposite) {
      const A slope = exp_minus_1(-a * x.d) * divide(A(1), a);
      return {excess(-a * x.d) * divide(A(1), a * a), slope, -slope};
    }
    if (exponents() == kOnlyA) return only(a, x);
    if (exponents() == kOnlyB) {
      const Term<A> t = only(b, {x.q, x.p, x.log2_q, x.log2_p, -x.d});
      return {t.value, t.to_q, t.to_p};
    }
    return general(x);
  }

  KD_HD void set_row(double, bool) {}

 private:
  // 1 / c^2 sum [p^c log(p^c / q^c) - p^c + q^c]
  KD_HD static Term<A> only(A c, const Point<A>& x) {
    const bool larger_p = x.d > 0;
    const A e = fabs(x.d), scaled = c * e, less = exp_minus_1(scaled);
    const A power = any_exp2(c * (larger_p ? x.log2_p : x.log2_q)), at_p = any_exp2(c * x.log2_p);
    // 1 - (1 + c e) e^(-c e) where q is the larger one
    const A far = -less - (less == -1 ? A(0) : scaled * (less + 1));
    const A of_q = fabs(scaled) <= A(0.25) ? small_excess(-scaled) * (less + 1) : far;
    return {power * (larger_p ? excess(scaled) : of_q) * divide(A(1), c * c), at_p == 0 ? A(0) : at_p * x.d,
            power * (larger_p ? less : -less) * divide(A(1), c)};
  }

  KD_HD Term<A> general(const Point<A>& x) const {
    const bool larger_p = x.d > 0;
    const A e = fabs(x.d), power = any_exp2((a + b) * (larger_p ? x.log2_p : x.log2_q));
    const A less_a = exp_minus_1(a * e), less_b = exp_minus_1(b * e);
    const A c = larger_p ? b : a, share = c * divide(A(1), a + b);
    const bool small = e * max(max(fabs(a), fabs(b)), fabs(a + b)) <= A(0.25);
    const A near = small_excess(small ? c * e : A(0)) - share * small_excess(small ? (a + b) * e : A(0));
    const A far = (larger_p ? less_b : less_a) - share * exp_minus_1((a + b) * e);
    return {power * (small ? near : far) * divide(A(-1), a * b),
            power * less_b * (larger_p ? A(-1) : less_a + 1) * divide(A(1), b),
            power * less_a * (larger_p ? less_b + 1 : A(-1)) * divide(A(1), a)};
  }
};

// KL(p || p); NaN stays to be seen.
template <class A>
struct Nothing {
  KD_HD Term<A> operator()(const Point<A>& x) const { return {(x.p - x.p) + (x.q - x.q), 0, 0}; }
  KD_HD void set_row(double, bool) {}
};

// -p log q.
template <class A>
struct CrossEntropy {
  KD_HD Term<A> operator()(const Point<A>& x) const {
    const A value = x.p == 0 ? A(0) : A(-kLn2) * x.p * x.log2_q;
    return {value, value, x.q - x.p};
  }

  KD_HD void set_row(double, bool) {}
};

// ---- a row: its statistics are those of both sides
constexpr int64_t kMax = 0, kSum = 1, kSlope = 2, kMoment = 3, kMean = 4, kStd = 5, kSide = 6, kStats = 2 * kSide;

// What a row's sums are made of: F, and of each side g, g c and p c with the centred logit c.
template <class A>
struct RowSums {
  A value, g_p, g_q, gc_p, gc_q, pc_p, pc_q;
};

// G and H of a side. An infinite row whose slopes are infinite has none on that side: then G is infinite. That of a row
// that is NaN makes all slopes NaN.
template <class A>
struct SideSums {
  A slope, moment;

  template <class S>
  KD_HD SideSums(S value, S g, S gc, S pc) : slope(static_cast<A>(g)), moment(static_cast<A>(gc - g * pc)) {
    if (value != value) slope = not_a_number<A>();
    if (value == infinity<S>() && !(g - g == 0)) {
      slope = infinity<A>();
      moment = 0;
    }
  }
};

// A side's gradient: scale (g - p G) + through (z - mean), the latter where the temperature is that of a std.
template <class A>
struct SideGrad {
  A scale, total, through, mean;
  uint32_t has_slope, has_through;

  KD_HD SideGrad(A scale, A total, A through, A mean)
      : scale(scale),
        total(total),
        through(through),
        mean(mean),
        has_slope(scale == 0 ? 0u : ~0u),
        has_through(through == 0 ? 0u : ~0u) {}

  KD_HD A operator()(A slope, A p, A z) const {
    return where(has_slope, scale * (slope - p * total)) + where(has_through, through * (z - mean));
  }
};

// temperature: of the row before it is standardised; statistics(k): of the side.
template <class A, class F>
KD_HD SideGrad<A> side_grad(const F& statistics, A factor, A temperature, bool standardize, int64_t cols) {
  const A total = statistics(kSlope), std = statistics(kStd);
  if (total == infinity<A>()) return {0, 0, 0, 0};
  const A tau = standardize ? temperature * (A(kStdEps) + std) : temperature;
  const A through = standardize && std != 0 ? divide(-factor * statistics(kMoment) * temperature,
                                                     tau * tau * A(cols > 1 ? cols - 1 : 1) * std)
                                            : A(0);
  return {divide(factor, tau), total, through, statistics(kMean)};
}

}  // namespace divergence
}  // namespace kdfast
