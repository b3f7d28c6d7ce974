// KL(p || q) of one row, with p and q the softmax of logits at temperature T, and what is built on it.
//
// Notation of common/softmax.h. Gradients are
//   T dKL/dz_q = q - p,    T dKL/dz_p = p (log p - log q - KL),
// so the backward needs max, sum and KL of a row, which is all that the forward saves.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/softmax.h"

namespace kdfast {
namespace softmax_kl {

// Running maxima and sums of one row; A is the logits' type, S that of the sums. `dot` is sum_j e_p (c_p - c_q) with
// the centred logits c = z - max: their difference is exactly 0 where p = q.
template <class A, class S>
struct KlState {
  A max_p = -infinity<A>(), max_q = -infinity<A>();
  S sum_p = 0, sum_q = 0, dot = 0;

  // Express the sums relative to new maxima, which are not below the present ones.
  KD_HD void rebase(A new_p, A new_q, A rate) {
    // A side that was -inf so far has an empty sum, or an infinite dot: there is nothing to shift.
    const S shift_p = max_p == -infinity<A>() ? S(0) : S(max_p - new_p);
    const S shift_q = max_q == -infinity<A>() ? S(0) : S(max_q - new_q);
    const S scale_p = exp2(shift_p * rate);
    dot = scale_p > 0 ? scale_p * (dot + (sum_p > 0 ? sum_p * (shift_p - shift_q) : S(0))) : S(0);
    sum_p *= scale_p;
    sum_q *= exp2(shift_q * rate);
    max_p = new_p;
    max_q = new_q;
  }

  KD_HD Softmax<A> p() const { return {finite_max(max_p), A(sum_p)}; }
  KD_HD Softmax<A> q() const { return {finite_max(max_q), A(sum_q)}; }

  KD_HD S kl(A rate) const { return kl_of_sums<S>(sum_p, sum_q, dot, rate); }
};

template <class A, class S>
KD_HD NearRow<A> near_row(const KlState<A, S>& s, A rate) {
  return {s.p().max, s.q().max, s.sum_p, s.sum_q, rate, true};
}

// Gradients of a row's loss. For q: factor (of_q e_q - of_p e_p), where the larger of of_q and of_p is 1: so it is
// exactly 0 where p = q, also when the compiler fuses the subtraction. For p: e_p (slope (c_p - c_q) + offset), 0 where
// e_p is 0.
template <class A>
struct KlGrad {
  A factor, of_q, of_p, slope, offset;

  KD_HD KlGrad(A coef_q, A coef_p, A slope, A offset)
      : factor(max(fabs(coef_q), fabs(coef_p))), of_q(part(coef_q)), of_p(part(coef_p)), slope(slope), offset(offset) {}

 private:
  KD_HD A part(A coef) const { return coef == factor ? A(1) : divide(coef, factor); }
};

// Of scale * KL, with more_q q and more_p p taken off the gradients in q and p.
template <class A>
KD_HD KlGrad<A> kl_grad(Softmax<A> p, Softmax<A> q, A kl, A scale, A rate, A more_q = 0, A more_p = 0) {
  const A inverse_p = p.inverse();
  // An empty p weighs nothing; an infinite KL has no slope in p.
  const A inverse_q = p.sum == 0 ? A(0) : q.inverse();
  const bool infinite = kl == infinity<A>();
  const A bit = infinite ? A(0) : A(kLn2) * scale * inverse_p;
  const A offset = infinite || p.sum == 0 ? A(0) : -bit * (p.log2_sum() - q.log2_sum() + A(kLog2E) * kl);
  return {scale * inverse_q - more_q * q.inverse(), scale * inverse_p, bit * rate, offset - more_p * inverse_p};
}

template <class A>
KD_HD A kl_grad_q(const KlGrad<A>& g, A e_p, A e_q) {
  return g.factor * (g.of_q * e_q - g.of_p * e_p);
}

template <class A>
KD_HD A kl_grad_p(const KlGrad<A>& g, A e_p, A log_ratio) {
  return e_p == 0 ? A(0) : e_p * (g.slope == 0 ? g.offset : g.slope * log_ratio + g.offset);
}

// ---- a top-k teacher: the classes it leaves out are one more outcome, whose logit on the student's side is their
// log-sum.
// That logit less `max`; -inf if there is no other class.
template <class A>
KD_HD A centred_log_sum(Softmax<A> rest, A max, A rate) {
  return rest.sum == 0 ? -infinity<A>() : (rest.max - max) + divide(log2(rest.sum), rate);
}

// The sum of exponentials that belongs to it, relative to `max`.
template <class A>
KD_HD A exp_rest(Softmax<A> rest, A max, A rate) {
  return rest.sum == 0 ? A(0) : rest.sum * exp2((rest.max - max) * rate);
}

// Adds the outcome to sums whose maxima cover it; rest_p is the teacher's logit.
template <class A, class S>
KD_HD void add_rest(KlState<A, S>& s, A rest_p, Softmax<A> rest_q, A rate) {
  const A c_p = rest_p - s.p().max, max_q = s.q().max, e_p = exp2(c_p * rate);
  s.sum_p += e_p;
  s.sum_q += exp_rest(rest_q, max_q, rate);
  s.dot += kl_term(e_p, c_p - centred_log_sum(rest_q, max_q, rate));
}

// Its term where the distributions are near.
template <class A>
KD_HD A near_rest_term(const NearRow<A>& near, A rest_p, Softmax<A> rest_q) {
  const A z_q = near.max_q + centred_log_sum(rest_q, near.max_q, near.rate);
  return near_term(near.p(rest_p), near.inverse_q * exp_rest(rest_q, near.max_q, near.rate),
                   near.log_ratio(rest_p, z_q));
}

// The gradient at the outcome is shared by its classes in the student's proportions: the factor of exp((z - max) / T).
template <class A>
KD_HD A rest_grad(const KlGrad<A>& g, A rest_p, Softmax<A> p, Softmax<A> q, Softmax<A> rest_q, A rate) {
  const A at_rest = kl_grad_q(g, exp2((rest_p - p.max) * rate), exp_rest(rest_q, q.max, rate));
  return at_rest * rest_q.inverse();
}

// ---- the mixture m = beta p + (1 - beta) q of the Jensen-Shannon divergence
// Both shares are rounded from float64: next to 1 a beta in float32 leaves nothing of the other one.
template <class A>
struct Shares {
  A p, q;
  bool mixed, reverse;  // 0 < beta < 1; beta = 1: KL(q || p)

  explicit Shares(double beta) : p(A(beta)), q(A(1 - beta)), mixed(beta > 0 && beta < 1), reverse(beta == 1) {}
};

template <class A>
struct Mixture {
  A p, q;              // probabilities
  A p_ratio, q_ratio;  // log2(p / m), log2(q / m); exactly 0 where p = q, of no meaning where that probability is 0
};

template <class A>
KD_HD Mixture<A> mixture(A p, A q, A log2_p, A log2_q, A of_p, A of_q) {
  // Where p and q are subnormal, m may be 0, and the ratios infinite.
  const A m = of_p * p + of_q * q, least = smallest_normal<A>();
  const A log2_m = m == m ? fast_log2(m < least ? least : m) : m;
  const bool equal = log2_p == log2_q;
  return {p, q, equal ? A(0) : log2_p - log2_m, equal ? A(0) : log2_q - log2_m};
}

template <class A>
KD_HD Mixture<A> mixture(A log2_p, A log2_q, A of_p, A of_q) {
  return mixture(exp2(log2_p), exp2(log2_q), log2_p, log2_q, of_p, of_q);
}

// The terms of KL(p || m) and KL(q || m) in nats, where these are near; d = log(p / q).
template <class A>
struct NearMixture {
  A p, q;
};

template <class A>
KD_HD NearMixture<A> near_mixture(const Mixture<A>& m, A d, A of_p, A of_q) {
  const A mixed = of_p * m.p + of_q * m.q;
  const bool small = fabs(d) <= A(0.25);
  // p / m = 1 / (1 + of_q (e^-d - 1))
  const A a_small = -small_log1p(small ? of_q * (small_excess(d) - d) : A(0));
  const A a = small ? a_small : A(kLn2) * m.p_ratio, b = small ? a_small - d : A(kLn2) * m.q_ratio;
  return {near_term(m.p, mixed, a), near_term(m.q, mixed, b)};
}

// p log2(p / m); with `kl` the sum of those over the row, the gradient of scale * KL in z_p.
template <class A>
KD_HD A mixture_term(A p, A ratio) {
  return p == 0 ? A(0) : p * ratio;
}

template <class A>
KD_HD A mixture_grad(A p, A ratio, A kl, A scale) {
  return p == 0 ? A(0) : scale * p * (ratio - kl);
}

// beta KL(p || m) + (1 - beta) KL(q || m), of which the plain divergences are the ends; times the row's weight.
template <class A>
KD_HD A row_value(A kl_p, A kl_q, const Shares<A>& shares, A weight, A scale) {
  const A value = shares.mixed ? shares.p * kl_p + shares.q * kl_q : shares.reverse ? kl_q : kl_p;
  return weight == 0 ? A(0) : scale * (weight * value);
}

// ---- cross-entropy with smoothed targets P' = (1 - smoothing) P + smoothing / C: sum_j P'_j (log sum_1 - (z_j - max))
template <class S>
struct CeState {
  S sum_1 = 0;                        // sum_j exp(z_j - max), temperature 1
  S centred = 0;                      // sum_j (z_j - max)
  S target_dot = 0, target_mass = 0;  // sum_j P_j (z_j - max), sum_j P_j
  S seen = 0;                         // classes

  // The student's maximum rises by -shift >= 0; `empty` while every logit was -inf.
  KD_HD void rebase(S shift, bool empty) {
    if (empty || shift == 0) return;
    sum_1 *= exp2(S(kLog2E) * shift);
    centred += seen * shift;
    target_dot += target_mass * shift;
  }
};

// The sum of a row's target below which its entries are no probabilities, whatever rounding did.
constexpr double kMinMass = -1e-3;

// P_j z_j, where 0 * (-inf) = 0.
template <class A>
KD_HD A target_term(A target, A z) {
  return target != 0 ? target * z : A(0);
}

template <class S>
KD_HD S cross_entropy(S sum_1, S centred, S target_dot, S target_mass, S smoothing, int64_t classes) {
  const S keep = 1 - smoothing;
  const S log_sum = sum_1 == 0 ? infinity<S>() : S(kLn2) * log2(sum_1);
  const S mass = keep * target_mass + smoothing;
  S value = mass != 0 ? mass * log_sum : S(0);
  if (keep != 0) value -= keep * target_dot;
  if (smoothing != 0) value -= smoothing / S(classes) * centred;
  return value;
}

// kl_scale KL + ce_weight CE; a term that weighs nothing is 0 even where it is infinite.
template <class A>
KD_HD A row_value_ce(A kl, A ce, A kl_scale, A ce_weight) {
  return (kl_scale == 0 ? A(0) : kl_scale * kl) + (ce_weight == 0 ? A(0) : ce_weight * ce);
}

// ---- DKD: the target class against the rest, from the log-odds of the target
template <class A>
KD_HD A sigmoid(A x) {
  const A e = std::exp(x < 0 ? x : -x);
  return (x < 0 ? e : A(1)) / (A(1) + e);
}

template <class A>
KD_HD A log_sigmoid(A x) {
  return (x < 0 ? x : A(0)) - std::log1p(std::exp(x < 0 ? x : -x));
}

// z_y / T against the log-sum of the other classes; +inf if no other class is possible.
template <class A>
KD_HD A log_odds(A target, Softmax<A> rest, A rate) {
  return rest.sum == 0 ? infinity<A>() : A(kLn2) * (rest.scaled(target, rate) - log2(rest.sum));
}

// `gap` is odds_p - odds_q.
template <class A>
KD_HD A target_kl(A odds_p, A odds_q, A gap) {
  const A p = sigmoid(odds_p), rest = sigmoid(-odds_p);
  if (fabs(gap) <= A(0.25)) {  // p / q = 1 + rest (e^gap - 1)
    const A up = small_excess(-gap) + gap, down = small_excess(gap) - gap;
    return p * small_excess(small_log1p(rest * up)) + rest * small_excess(small_log1p(p * down));
  }
  return kl_term(p, log_sigmoid(odds_p) - log_sigmoid(odds_q)) +
         kl_term(rest, log_sigmoid(-odds_p) - log_sigmoid(-odds_q));
}

// d target_kl / d odds_q and d odds_p.
template <class A>
KD_HD A target_grad_q(A odds_p, A odds_q) {
  return sigmoid(odds_q) - sigmoid(odds_p);
}

template <class A>
KD_HD A target_grad_p(A odds_p, A odds_q) {
  const A spread = sigmoid(odds_p) * sigmoid(-odds_p);
  return spread > 0 && odds_q - odds_q == 0 ? spread * (odds_p - odds_q) : A(0);
}

template <class A>
KD_HD A row_value_dkd(A target, A rest, A alpha, A beta, A scale) {
  return scale == 0 ? A(0) : scale * ((alpha == 0 ? A(0) : alpha * target) + (beta == 0 ? A(0) : beta * rest));
}

}  // namespace softmax_kl
}  // namespace kdfast
