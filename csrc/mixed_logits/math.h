// Many networks against targets that are mixed from their logits, row by row.
//
// Notation of common/softmax.h. A target t mixes networks: t = sum_m w_m c_m, of centred logits. With
// p = softmax(t / T), q of a learner and the smoothed target p' = p + eps over the classes that are active, that is not
// masked (-inf) in both, in bits:
//   KL_eps = sum p (log p' - log p) + sum p (log p - log q) + eps sum (log p' - log q)
//   T dKL/dz = mass q - p',  mass = sum p' = 1 + eps n_active
//   T dKL/dt = p (log p' - log q - slope),  slope = sum p (log p' - log q)
// The second term is a difference of centred logits, which is exactly 0 where the two are equal.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/networks.h"
#include "common/softmax.h"

namespace kdfast {
namespace mixed_logits {

// Sums over the classes that are active in a target, in bits.
template <class A>
struct SmoothedTargetSums {
  A kl_to_smoothed = 0;  // sum p (log p' - log p)
  A sum_log = 0;         // sum log p'
  A n_active = 0;

  KD_HD void add(A p, A log_p, A log_smoothed, bool active) {
    kl_to_smoothed += p == 0 ? A(0) : p * (log_smoothed - log_p);
    sum_log += active ? log_smoothed : A(0);
    n_active += active ? A(1) : A(0);
  }
};

// Sums over the classes of a learner and its target.
template <class A>
struct CrossSums {
  A dot = 0;                 // e_t (c_t - c_q)
  A sum_c = 0;               // c_q of the active classes
  A n_masked_in_target = 0;  // active classes that are masked in the target: p' = eps

  KD_HD void add(A e_t, A c_t, A c_q) {
    const bool target_masked = is_masked(c_t), both_masked = target_masked && is_masked(c_q);
    dot += kl_term(e_t, c_t - c_q);
    sum_c += both_masked ? A(0) : c_q;
    n_masked_in_target += target_masked && !both_masked ? A(1) : A(0);
  }
};

template <class A>
struct EpsKl {
  A value, slope, mass;  // value and slope in nats
};

// From kl = KL(p || q). A target that is masked everywhere has no loss.
template <class A>
KD_HD EpsKl<A> eps_kl(A kl, A sum_t, A sum_q, const SmoothedTargetSums<A>& smoothed, const CrossSums<A>& cross, A rate,
                      A eps) {
  if (sum_t == 0) return {0, 0, 0};
  const A n_active = smoothed.n_active + cross.n_masked_in_target, mass = eps == 0 ? A(1) : 1 + eps * n_active;
  if (sum_q == 0) return {infinity<A>(), infinity<A>(), mass};
  A slope = kl, value = kl;
  if (eps != 0) {
    slope += A(kLn2) * smoothed.kl_to_smoothed;
    const A sum_log = smoothed.sum_log + (cross.n_masked_in_target > 0 ? cross.n_masked_in_target * log2(eps) : A(0));
    value = slope + A(kLn2) * eps * (sum_log - (rate * cross.sum_c - n_active * log2(sum_q)));
  }
  return {value, slope, mass};
}

// Gradient of a learner: of_q e_q - of_p e_t - eps_part of an active class, plus of_1 exp(c) of the cross-entropy.
template <class A>
struct LearnerGrad {
  A of_q, of_p, eps_part, of_1;
};

template <class A>
KD_HD LearnerGrad<A> learner_grad(Softmax<A> target, Softmax<A> learner, A sum_1, A mass, A eps, A kl, A ce) {
  const A weight = target.sum == 0 ? A(0) : kl;
  return {weight * mass * learner.inverse(), weight * target.inverse(), weight * eps, cross_entropy_coef(ce, sum_1)};
}

template <class A>
KD_HD A learner_term(const LearnerGrad<A>& g, A e_t, A e_q, bool active) {
  return g.of_q * e_q - g.of_p * e_t - (active ? g.eps_part : A(0));
}

// Gradient of the divergence in the target's logits: p ln2 (log p' - log q - slope), slope in bits.
template <class A>
KD_HD A target_term(A p, A log_smoothed, A log_q, A slope) {
  return p == 0 ? A(0) : A(kLn2) * p * (log_smoothed - log_q - slope);
}

// A class's term of the gradient in a network's weight. A class that is masked in the network does not count.
template <class A>
KD_HD A weight_term(A target_grad, A c) {
  return is_masked(c) || target_grad == 0 ? A(0) : target_grad * c;
}

}  // namespace mixed_logits
}  // namespace kdfast
