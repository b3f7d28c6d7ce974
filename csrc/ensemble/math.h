// Many networks against mixed logits or teachers, row by row.
//
// Notation of common/softmax.h.
// A target t mixes networks: t = sum_m w_m c_m, of centred logits. With p = softmax(t / T), q of a learner and
// p' = p + eps over the classes that are not -inf in both ("live"), in bits:
//   KL_eps = sum p (log p' - log p) + sum p (log p - log q) + eps sum (log p' - log q)
//   T dKL/dz = mass q - p',  mass = sum p' = 1 + eps live
//   T dKL/dt = p (log p' - log q - slope),  slope = sum p (log p' - log q)
// The second term is a difference of centred logits, which is exactly 0 where the two are equal.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/softmax.h"

namespace kdfast {
namespace ensemble {

// ---- mixed_logits_kl
// What a target's own sums leave, in bits: over the classes that are not -inf in it,
template <class A>
struct Raised {
  A rise = 0;  // sum p (log p' - log p)
  A logs = 0;  // sum log p'
  A live = 0;  // how many they are

  KD_HD void add(A p, A log_p, A log_raised, bool live_class) {
    rise += p == 0 ? A(0) : p * (log_raised - log_p);
    logs += live_class ? log_raised : A(0);
    live += live_class ? A(1) : A(0);
  }
};

// What a learner and its target have in common, sums over the classes.
template <class A>
struct Shared {
  A dot = 0;      // e_t (c_t - c_q)
  A centred = 0;  // c_q of the live classes
  A extra = 0;    // live classes that are -inf in the target: p' = eps

  KD_HD void add(A e_t, A c_t, A c_q) {
    const bool gone = is_masked(c_t), dead = gone && is_masked(c_q);
    dot += kl_term(e_t, c_t - c_q);
    centred += dead ? A(0) : c_q;
    extra += gone && !dead ? A(1) : A(0);
  }
};

template <class A>
struct EpsKl {
  A value, slope, mass;  // value and slope in nats
};

// From kl = KL(p || q). An empty target teaches nothing.
template <class A>
KD_HD EpsKl<A> eps_kl(A kl, A sum_t, A sum_q, const Raised<A>& raised, const Shared<A>& shared, A rate, A eps) {
  if (sum_t == 0) return {0, 0, 0};
  const A live = raised.live + shared.extra, mass = eps == 0 ? A(1) : 1 + eps * live;
  if (sum_q == 0) return {infinity<A>(), infinity<A>(), mass};
  A slope = kl, value = kl;
  if (eps != 0) {
    slope += A(kLn2) * raised.rise;
    const A logs = raised.logs + (shared.extra > 0 ? shared.extra * log2(eps) : A(0));
    value = slope + A(kLn2) * eps * (logs - (rate * shared.centred - live * log2(sum_q)));
  }
  return {value, slope, mass};
}

// What exp(z - max) is multiplied by in the gradient of a cross-entropy.
template <class A>
KD_HD A of_1(A ce, A sum_1) {
  return ce == 0 ? A(0) : ce * Softmax<A>{0, sum_1}.inverse();
}

// Gradient of a learner: of_q e_q - of_p e_t - eps_part of a live class, plus of_1 exp(c) of the cross-entropy.
template <class A>
struct LearnerGrad {
  A of_q, of_p, eps_part, of_1;
};

template <class A>
KD_HD LearnerGrad<A> learner_grad(Softmax<A> target, Softmax<A> learner, A sum_1, A mass, A eps, A kl, A ce) {
  const A weight = target.sum == 0 ? A(0) : kl;
  return {weight * mass * learner.inverse(), weight * target.inverse(), weight * eps, of_1(ce, sum_1)};
}

template <class A>
KD_HD A learner_term(const LearnerGrad<A>& g, A e_t, A e_q, bool live) {
  return g.of_q * e_q - g.of_p * e_t - (live ? g.eps_part : A(0));
}

// Gradient of the divergence in the target's logits: p ln2 (log p' - log q - slope), slope in bits.
template <class A>
KD_HD A target_term(A p, A log_raised, A log_q, A slope) {
  return p == 0 ? A(0) : A(kLn2) * p * (log_raised - log_q - slope);
}

// A mixed class as it counts for the weights: one that is -inf moves no mixture that has it.
template <class A>
KD_HD A weight_term(A target_grad, A c) {
  return is_masked(c) || target_grad == 0 ? A(0) : target_grad * c;
}

template <class A>
KD_HD A weighed(A weight, A x) {
  return weight == 0 ? A(0) : weight * x;
}

// ---- teachers_kl
enum class Kind { kKl, kCrossEntropy, kReverse };

template <class A>
KD_HD A divergence_term(A e_p, A c_p, A c_q, bool cross) {
  return kl_term(e_p, cross ? -c_q : c_p - c_q);
}

// Gradient of a divergence in the teacher's logits: scale p (log ratio - divergence), logarithms in bits.
template <class A>
KD_HD A teacher_term(A p, A log_p, A log_q, A divergence, A scale, bool cross) {
  return p == 0 ? A(0) : scale * p * ((cross ? A(0) : log_p) - log_q - divergence);
}

// log2 of the mean of probabilities, from the largest of their logarithms and the sum of exp2 of the distances to it.
template <class A>
KD_HD A mean_log(A top, A sum, A count) {
  const A log = is_masked(top) ? top : top + (fast_log2(sum) - fast_log2(count));
  return sum == sum ? log : sum;  // NaN if one of them is
}

template <class A>
KD_HD A reverse_term(A q, A log_q, A log_r) {
  return q == 0 ? A(0) : q * (log_q - log_r);
}

// The same of near rows, in nats.
template <class A>
KD_HD A near_reverse_term(A q, A log_q, A log_r) {
  return near_term(q, exp2(log_r), A(kLn2) * (log_q - log_r));
}

template <class A>
KD_HD A reverse_grad(A q, A log_q, A log_r, A kl, A scale) {
  return q == 0 || kl == infinity<A>() ? A(0) : scale * q * (log_q - log_r - kl);
}

// ---- AE-KD: min a' G a, sum a = 1, 0 <= a <= cap
constexpr double kRidge = 1e-13, kTolerance = 1e-13;

// In doubles: what simplex_minimum works in.
KD_HD int64_t simplex_memory(int64_t count) { return count * count + 4 * count; }

// Solves R' R x = x in place, R the Cholesky factor [n, n] in the upper triangle of rows of `count`.
KD_HD void solve_factored(const double* r, int64_t count, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < i; ++k) x[i] -= r[k * count + i] * x[k];
    x[i] /= r[i * count + i];
  }
  for (int64_t i = n; i-- > 0;) {
    for (int64_t k = i + 1; k < n; ++k) x[i] -= r[i * count + k] * x[k];
    x[i] /= r[i * count + i];
  }
}

KD_HD double simplex_slope(const double* gram, const double* slope, const double* a, int64_t count, double ridge,
                           int64_t i) {
  double g = (slope ? slope[i] : 0) + ridge * a[i];
  for (int64_t j = 0; j < count; ++j) g += gram[i * count + j] * a[j];
  return g;
}

// argmin_a a' G a / 2 + slope' a with sum a = 1 and 0 <= a <= cap, for a convex G [count, count]; slope may be null.
// An active set: solve for the free weights with the others at their bounds, go there as far as the bounds allow and
// fix the weight that stopped it; or, being there, free the weight that pulls hardest. place: -1 at 0, 1 at cap, 0
// free.
KD_HD void simplex_minimum(const double* gram, const double* slope, int64_t count, double cap, double* memory,
                           double* a) {
  for (int64_t i = 0; i < count; ++i) a[i] = 1.0 / static_cast<double>(count);
  if (cap * static_cast<double>(count) <= 1) return;
  double *factor = memory, *one = factor + count * count, *x = one + count, *place = x + count, *free = place + count;
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = max(largest, gram[i * count + i]);
    place[i] = 0;
  }
  const double ridge = kRidge * (largest > 0 ? largest : 1);
  for (int64_t step = 0; step < 64 + 16 * count; ++step) {
    // G_FF one = 1 and G_FF x = -(slope + G a_fixed): the free weights are mu one + x, mu from their sum.
    int64_t n = 0;
    double rest = 1;
    for (int64_t i = 0; i < count; ++i) {
      if (place[i] == 0)
        free[n++] = static_cast<double>(i);
      else
        rest -= a[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = static_cast<int64_t>(free[i]);
      one[i] = 1;
      x[i] = slope ? -slope[row] : 0;
      for (int64_t j = 0; j < count; ++j) {
        if (place[j] != 0) x[i] -= gram[row * count + j] * a[j];
      }
      for (int64_t j = i; j < n; ++j) {
        double sum = gram[row * count + static_cast<int64_t>(free[j])] + (i == j ? ridge : 0);
        for (int64_t k = 0; k < i; ++k) sum -= factor[k * count + i] * factor[k * count + j];
        // Rounding may leave nothing of a diagonal entry of a singular G.
        factor[i * count + j] = i == j ? std::sqrt(max(sum, ridge * kRidge)) : sum / factor[i * count + i];
      }
    }
    solve_factored(factor, count, n, one);
    solve_factored(factor, count, n, x);
    double ones = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      ones += one[i];
      sum += x[i];
    }
    const double mu = n > 0 ? (rest - sum) / ones : 0;
    double length = 1;
    int64_t stopped = -1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = static_cast<int64_t>(free[i]);
      x[i] += mu * one[i] - a[at];
      const double room = x[i] > 0 ? (cap - a[at]) / x[i] : x[i] < 0 ? -a[at] / x[i] : 1;
      if (room < length) {
        length = room > 0 ? room : 0;
        stopped = i;
      }
    }
    for (int64_t i = 0; i < n; ++i) a[static_cast<int64_t>(free[i])] += length * x[i];
    if (stopped >= 0) {
      const int64_t at = static_cast<int64_t>(free[stopped]);
      place[at] = x[stopped] > 0 ? 1 : -1;
      a[at] = x[stopped] > 0 ? cap : 0;
      continue;
    }
    // All free weights have one slope; which of the others wants to come back?
    int64_t low = -1, high = -1;
    double lowest = 0, highest = 0, common = 0, size = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double g = simplex_slope(gram, slope, a, count, ridge, i);
      size = max(size, std::fabs(g));
      if (place[i] == 0) common += g / static_cast<double>(n);
      if (place[i] < 0 && (low < 0 || g < lowest)) low = i, lowest = g;
      if (place[i] > 0 && (high < 0 || g > highest)) high = i, highest = g;
    }
    const double least = kTolerance * size;
    if (n == 0) {  // at a corner: a pair
      if (low < 0 || high < 0 || !(highest - lowest > least)) return;
      place[low] = place[high] = 0;
      continue;
    }
    const double rise = low < 0 ? -1 : common - lowest, fall = high < 0 ? -1 : highest - common;
    if (!(max(rise, fall) > least)) return;
    place[rise >= fall ? low : high] = 0;
  }
}

// AE-KD's weights from G of any magnitude, which is overwritten; `lengths` [count].
KD_HD void aekd_weights(double* gram, int64_t count, double slack, bool normalize, double* memory, double* lengths,
                        double* weights) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = max(largest, gram[i * count + i]);
  for (int64_t i = 0; i < count; ++i) {
    const double length = largest > 0 ? std::sqrt(gram[i * count + i] / largest) : 0;
    // A teacher whose mean gradient is 0 takes all weight.
    lengths[i] = normalize ? max(length, 1e-12) : 1;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      gram[i * count + j] = largest > 0 ? gram[i * count + j] / largest / (lengths[i] * lengths[j]) : 0;
    }
  }
  simplex_minimum(gram, nullptr, count, slack, memory, weights);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] /= lengths[i];
    sum += weights[i];
  }
  for (int64_t i = 0; i < count && normalize; ++i) weights[i] /= sum;
}

}  // namespace ensemble
}  // namespace kdfast
