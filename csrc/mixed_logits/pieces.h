// Vectorised loops of mixed_logits_kl over a piece of a row, on the CPU.
#pragma once

#include "common/logit_rows.h"
#include "mixed_logits/layout.h"

namespace kdfast {
namespace mixed_logits {

// ---- forward
// Mixes kM networks to kR targets: out_r = sum_m w_rm (z_m - max_m), w [kR, kMaxNetworks]; -> the largest of each.
template <int kM, int kR, class A>
Terms<A> mix_pieces(const A* const* z, const A* max, const A* w, int64_t n, A* const* out) {
  // All in locals: the compiler would reload them after each store, which may alias.
  constexpr int m_1 = kM > 1, m_2 = kM > 2 ? 2 : 0, m_3 = kM > 3 ? 3 : 0;
  constexpr int r_1 = kR > 1, r_2 = kR > 2 ? 2 : 0, r_3 = kR > 3 ? 3 : 0;
  const A *z_0 = z[0], *z_1 = z[m_1], *z_2 = z[m_2], *z_3 = z[m_3];
  const A max_0 = max[0], max_1 = max[m_1], max_2 = max[m_2], max_3 = max[m_3];
  A *out_0 = out[0], *out_1 = out[r_1], *out_2 = out[r_2], *out_3 = out[r_3];
  struct Weights {
    A a, b, c, d;
  };
  const auto weights = [&](int r) {
    return Weights{w[r * kMaxNetworks], w[r * kMaxNetworks + m_1], w[r * kMaxNetworks + m_2],
                   w[r * kMaxNetworks + m_3]};
  };
  const Weights w_0 = weights(0), w_1 = weights(r_1), w_2 = weights(r_2), w_3 = weights(r_3);
  return max_elements<kR, A>(n, [&](int64_t i) KD_INLINED {
    const A c_0 = z_0[i] - max_0, c_1 = z_1[i] - max_1, c_2 = z_2[i] - max_2, c_3 = z_3[i] - max_3;
    const auto mixed = [&](Weights w) KD_INLINED {
      A sum = w.a * c_0;
      if (kM > 1) sum += w.b * c_1;
      if (kM > 2) sum += w.c * c_2;
      if (kM > 3) sum += w.d * c_3;
      return sum;
    };
    const Terms<A> t{mixed(w_0), mixed(w_1), mixed(w_2), mixed(w_3), 0};
    out_0[i] = t.a;
    if (kR > 1) out_1[i] = t.b;
    if (kR > 2) out_2[i] = t.c;
    if (kR > 3) out_3[i] = t.d;
    return t;
  });
}

// out += sum_m w_m (z_m - max_m) of kM networks.
template <int kM, class A>
void add_mixed(const A* const* z, const A* max, const A* w, int64_t n, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED {
    A sum = w[0] * (z[0][i] - max[0]);
    if (kM > 1) sum += w[1] * (z[1][i] - max[1]);
    if (kM > 2) sum += w[2] * (z[2][i] - max[2]);
    if (kM > 3) sum += w[3] * (z[3][i] - max[3]);
    return old + sum;
  });
}

// min_m (z_m - origin_m)
template <class A>
void min_piece(const A* const* z, const A* origin, int64_t count, int64_t n, A* out) {
  for (int64_t m = 0; m < count; ++m) {
    const A *from = z[m], zero = origin[m];
    update_elements(out, n, [&](int64_t i, A old) KD_INLINED {
      const A c = from[i] - zero;
      return m == 0 || c < old ? c : old;
    });
  }
}

template <class A>
struct LearnerSums {
  A sum, sum_1, dot, sum_c, n_masked_in_target;

  // Whether a logit was masked, so that the sums have to be taken with kMasked.
  bool has_masked() const { return !(dot - dot == 0 && sum_c - sum_c == 0); }
};

// A learner beside its target, whose exponentials are e_t. Without kMasked no logit may be masked; `has_masked` of the
// result tells if one was.
template <int kT, bool kEps, bool kMasked, class A>
LearnerSums<A> learner_sums(const A* z, const A* t, const A* e_t, int64_t n, A max_q, A max_t, A rate) {
  const auto sums = sum_elements<kMasked ? 5
                                 : kEps  ? 4
                                         : 3,
                                 A>(n, [&](int64_t i) KD_INLINED {
    const A c_q = z[i] - max_q, c_t = t[i] - max_t, e_q = exp2(c_q * rate);
    if (!kMasked) return Terms<A>{e_q, exp_1<kT>(e_q, c_q), e_t[i] * (c_t - c_q), c_q};
    CrossSums<A> terms;
    terms.add(e_t[i], c_t, c_q);
    return Terms<A>{e_q, exp_1<kT>(e_q, c_q), terms.dot, terms.sum_c, terms.n_masked_in_target};
  });
  return {sums.a, sums.b, sums.c, sums.d, sums.e};
}

template <class A>
struct OwnSums {
  LearnerSums<A> learner;
  A target;
};

// A learner beside a target of its own, whose exponentials are written to e_t and summed.
template <int kT, class A>
OwnSums<A> own_sums(const A* z, const A* t, A* e_t, int64_t n, A max_q, A max_t, A rate) {
  const auto sums = sum_elements<5, A>(n, [&](int64_t i) KD_INLINED {
    const A c_q = z[i] - max_q, c_t = t[i] - max_t, e_q = exp2(c_q * rate), e = exp2(c_t * rate);
    e_t[i] = e;
    return Terms<A>{e_q, exp_1<kT>(e_q, c_q), e * (c_t - c_q), c_q, e};
  });
  return {{sums.a, sums.b, sums.c, sums.d, 0}, sums.e};
}

template <bool kMasked, class A>
SmoothedTargetSums<A> smoothed_sums(const A* t, const A* e, int64_t n, LogSoftmax<A> s, A eps) {
  const auto sums = sum_elements<kMasked ? 3 : 2, A>(n, [&](int64_t i) KD_INLINED {
    const A c = t[i] - s.max, p = e[i] * s.inverse, log_p = c * s.rate - s.log2_sum, log_smoothed = fast_log2(p + eps);
    if (!kMasked) return Terms<A>{p * (log_smoothed - log_p), log_smoothed};
    SmoothedTargetSums<A> terms;
    terms.add(p, log_p, log_smoothed, !is_masked(c));
    return Terms<A>{terms.kl_to_smoothed, terms.sum_log, terms.n_active};
  });
  return {sums.a, sums.b, kMasked ? sums.c : static_cast<A>(n)};
}

// ---- gradients
template <int kT, bool kEps, class A>
void learner_grad_piece(const A* z, const A* t, const A* e_t, int64_t n, A max, A rate, LearnerGrad<A> g, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max, e = exp2(c * rate);
    const bool active = kEps && !is_masked(kdfast::max(z[i], t[i]));
    out[i] = learner_term(g, e_t[i], e, active) + g.of_1 * exp_1<kT>(e, c);
  });
}

// The same plus w g_t, the network's share of the target's gradient g_t; -> sum g_t (z - max).
template <int kT, bool kEps, class A>
A learner_and_target_grad_piece(const A* z, const A* t, const A* e_t, const A* g_t, int64_t n, A max, A rate,
                                LearnerGrad<A> g, A w, A* out) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max, e = exp2(c * rate);
    const bool active = kEps && !is_masked(kdfast::max(z[i], t[i]));
    const A target_grad = g_t[i];
    out[i] = learner_term(g, e_t[i], e, active) + g.of_1 * exp_1<kT>(e, c) + w * target_grad;
    return weight_term(target_grad, c);
  });
}

// The gradients of a learner, and of the divergence in the target's logits: `to_target` is overwritten, or accumulated
// into if kAdd; slope in bits.
template <int kT, bool kEps, bool kAdd, class A>
void both_grads_piece(const A* z, const A* t, const A* e_t, int64_t n, LogSoftmax<A> q, LogSoftmax<A> p,
                      LearnerGrad<A> g, A eps, A slope, A scale, A* out, A* to_target) {
  const auto grads = [&](int64_t i) KD_INLINED {
    const A c = z[i] - q.max, e = exp2(c * q.rate), p_t = e_t[i] * p.inverse;
    const bool active = kEps && !is_masked(kdfast::max(z[i], t[i]));
    out[i] = learner_term(g, e_t[i], e, active) + g.of_1 * exp_1<kT>(e, c);
    const A log_smoothed = kEps ? fast_log2(p_t + eps) : (t[i] - p.max) * p.rate - p.log2_sum;
    return scale * target_term(p_t, log_smoothed, c * q.rate - q.log2_sum, slope);
  };
  if (kAdd) return update_elements(to_target, n, [&](int64_t i, A old) KD_INLINED { return old + grads(i); });
  for_elements<A>(n, [&](int64_t i) KD_INLINED { to_target[i] = grads(i); });
}

// coef exp(z - max)
template <int kT, class A>
void ce_piece(const A* z, int64_t n, A max, A rate, A coef, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max;
    out[i] = coef * exp_1<kT>(kT == 0 ? A(0) : exp2(c * rate), c);
  });
}

// Adds coef exp(t - max).
template <int kT, class A>
void ce_grad_piece(const A* t, const A* e_t, int64_t n, A max, A coef, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED { return old + coef * exp_1<kT>(e_t[i], t[i] - max); });
}

// out += w g_t, the network's share of a target's gradient; -> sum g_t (z - max).
template <class A>
A add_target_grad(const A* z, A max, const A* g_t, A w, int64_t n, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED { return old + w * g_t[i]; });
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return weight_term(g_t[i], z[i] - max); });
}

// Adds a network's shares of the gradients of kR targets: out = from + sum_r w_r g_r, out of place;
// dots_r += sum g_r (z - max).
template <int kR, class A>
void target_grads_piece(const A* z, A max, const A* const* g, const A* w, int64_t n, const A* from, A* out,
                        double* dots) {
  // In locals: the compiler would reload them after each store, which may alias.
  constexpr int k_1 = kR > 1, k_2 = kR > 2 ? 2 : 0, k_3 = kR > 3 ? 3 : 0, k_4 = kR > 4 ? 4 : 0;
  const A *g_0 = g[0], *g_1 = g[k_1], *g_2 = g[k_2], *g_3 = g[k_3], *g_4 = g[k_4];
  const A w_0 = w[0], w_1 = w[k_1], w_2 = w[k_2], w_3 = w[k_3], w_4 = w[k_4];
  const auto sums = sum_elements<kR, A>(n, [&](int64_t i) KD_INLINED {
    const A c = is_masked(z[i]) ? A(0) : z[i] - max;
    const A x_0 = g_0[i], x_1 = g_1[i], x_2 = g_2[i], x_3 = g_3[i], x_4 = g_4[i];
    A sum = from[i] + w_0 * x_0;
    if (kR > 1) sum += w_1 * x_1;
    if (kR > 2) sum += w_2 * x_2;
    if (kR > 3) sum += w_3 * x_3;
    if (kR > 4) sum += w_4 * x_4;
    out[i] = sum;
    return Terms<A>{x_0 * c, x_1 * c, x_2 * c, x_3 * c, x_4 * c};
  });
  if (!dots) return;
  const A all[] = {sums.a, sums.b, sums.c, sums.d, sums.e};
  for (int r = 0; r < kR; ++r) dots[r] += all[r];
}

}  // namespace mixed_logits
}  // namespace kdfast
