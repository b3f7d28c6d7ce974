#include <algorithm>
#include <memory>

#include "common/logit_rows.h"
#include "ensemble/layout.h"

namespace kdfast {
namespace ensemble {
namespace {

// ---- pieces of a row
// Mixes kM networks to kR targets: out_r = sum_m w_rm (z_m - max_m), w [kR, kMost]; -> the largest of each.
template <int kM, int kR, class A>
KD_MULTIVERSION Terms<A> mix_pieces(const A* const* z, const A* max, const A* w, int64_t n, A* const* out) {
  // All by value: the compiler would read them again after each store.
  constexpr int m_1 = kM > 1, m_2 = kM > 2 ? 2 : 0, m_3 = kM > 3 ? 3 : 0;
  constexpr int r_1 = kR > 1, r_2 = kR > 2 ? 2 : 0, r_3 = kR > 3 ? 3 : 0;
  const A *z_0 = z[0], *z_1 = z[m_1], *z_2 = z[m_2], *z_3 = z[m_3];
  const A max_0 = max[0], max_1 = max[m_1], max_2 = max[m_2], max_3 = max[m_3];
  A *out_0 = out[0], *out_1 = out[r_1], *out_2 = out[r_2], *out_3 = out[r_3];
  struct Weights {
    A a, b, c, d;
  };
  const auto weights = [&](int r) {
    return Weights{w[r * kMost], w[r * kMost + m_1], w[r * kMost + m_2], w[r * kMost + m_3]};
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
KD_MULTIVERSION void mix_more(const A* const* z, const A* max, const A* w, int64_t n, A* out) {
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
KD_MULTIVERSION void least_piece(const A* const* z, const A* origin, int64_t count, int64_t n, A* out) {
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
  A sum, sum_1, dot, centred, extra;

  // What the careful form is for.
  bool has_masked() const { return !(dot - dot == 0 && centred - centred == 0); }
};

// A learner beside its target, whose exponentials are e_t. Without kMasked no logit is -inf, or `has_masked` tells.
template <int kT, bool kEps, bool kMasked, class A>
KD_MULTIVERSION LearnerSums<A> learner_sums(const A* z, const A* t, const A* e_t, int64_t n, A max_q, A max_t, A rate) {
  const auto sums = sum_elements<kMasked ? 5
                                 : kEps  ? 4
                                         : 3,
                                 A>(n, [&](int64_t i) KD_INLINED {
    const A c_q = z[i] - max_q, c_t = t[i] - max_t, e_q = exp2(c_q * rate);
    if (!kMasked) return Terms<A>{e_q, exp_1<kT>(e_q, c_q), e_t[i] * (c_t - c_q), c_q};
    Shared<A> one;
    one.add(e_t[i], c_t, c_q);
    return Terms<A>{e_q, exp_1<kT>(e_q, c_q), one.dot, one.centred, one.extra};
  });
  return {sums.a, sums.b, sums.c, sums.d, sums.e};
}

template <class A>
struct OwnSums {
  LearnerSums<A> learner;
  A target;
};

// A learner beside a target of its own, whose exponentials are written, and summed up at T.
template <int kT, class A>
KD_MULTIVERSION OwnSums<A> own_sums(const A* z, const A* t, A* e_t, int64_t n, A max_q, A max_t, A rate) {
  const auto sums = sum_elements<5, A>(n, [&](int64_t i) KD_INLINED {
    const A c_q = z[i] - max_q, c_t = t[i] - max_t, e_q = exp2(c_q * rate), e = exp2(c_t * rate);
    e_t[i] = e;
    return Terms<A>{e_q, exp_1<kT>(e_q, c_q), e * (c_t - c_q), c_q, e};
  });
  return {{sums.a, sums.b, sums.c, sums.d, 0}, sums.e};
}

template <bool kMasked, class A>
KD_MULTIVERSION Raised<A> raised_sums(const A* t, const A* e, int64_t n, LogSoftmax<A> s, A eps) {
  const auto sums = sum_elements<kMasked ? 3 : 2, A>(n, [&](int64_t i) KD_INLINED {
    const A c = t[i] - s.max, p = e[i] * s.inverse, log_p = c * s.rate - s.log2_sum, log_raised = fast_log2(p + eps);
    if (!kMasked) return Terms<A>{p * (log_raised - log_p), log_raised};
    Raised<A> one;
    one.add(p, log_p, log_raised, !is_masked(c));
    return Terms<A>{one.rise, one.logs, one.live};
  });
  return {sums.a, sums.b, kMasked ? sums.c : static_cast<A>(n)};
}

// ---- pieces of gradients
template <int kT, bool kEps, class A>
KD_MULTIVERSION void learner_grad_piece(const A* z, const A* t, const A* e_t, int64_t n, A max, A rate,
                                        LearnerGrad<A> g, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max, e = exp2(c * rate);
    const bool live = kEps && !is_masked(kdfast::max(z[i], t[i]));
    out[i] = learner_term(g, e_t[i], e, live) + g.of_1 * exp_1<kT>(e, c);
  });
}

// The same, and w g_t more, the gradient of the target taken to the network; -> sum g_t (z - max).
template <int kT, bool kEps, class A>
KD_MULTIVERSION A learner_spread_piece(const A* z, const A* t, const A* e_t, const A* g_t, int64_t n, A max, A rate,
                                       LearnerGrad<A> g, A w, A* out) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max, e = exp2(c * rate);
    const bool live = kEps && !is_masked(kdfast::max(z[i], t[i]));
    const A flow = g_t[i];
    out[i] = learner_term(g, e_t[i], e, live) + g.of_1 * exp_1<kT>(e, c) + w * flow;
    return weight_term(flow, c);
  });
}

// The gradients of a learner, and of the divergence in the target's logits, which `to_target` becomes, or is added to
// if kAdd; slope in bits.
template <int kT, bool kEps, bool kAdd, class A>
KD_MULTIVERSION void both_grads_piece(const A* z, const A* t, const A* e_t, int64_t n, LogSoftmax<A> q, LogSoftmax<A> p,
                                      LearnerGrad<A> g, A eps, A slope, A scale, A* out, A* to_target) {
  const auto grads = [&](int64_t i) KD_INLINED {
    const A c = z[i] - q.max, e = exp2(c * q.rate), p_t = e_t[i] * p.inverse;
    const bool live = kEps && !is_masked(kdfast::max(z[i], t[i]));
    out[i] = learner_term(g, e_t[i], e, live) + g.of_1 * exp_1<kT>(e, c);
    const A log_raised = kEps ? fast_log2(p_t + eps) : (t[i] - p.max) * p.rate - p.log2_sum;
    return scale * target_term(p_t, log_raised, c * q.rate - q.log2_sum, slope);
  };
  if (kAdd) return update_elements(to_target, n, [&](int64_t i, A old) KD_INLINED { return old + grads(i); });
  for_elements<A>(n, [&](int64_t i) KD_INLINED { to_target[i] = grads(i); });
}

// coef exp(z - max)
template <int kT, class A>
KD_MULTIVERSION void ce_piece(const A* z, int64_t n, A max, A rate, A coef, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max;
    out[i] = coef * exp_1<kT>(kT == 0 ? A(0) : exp2(c * rate), c);
  });
}

// Adds coef exp(t - max).
template <int kT, class A>
KD_MULTIVERSION void ce_grad_piece(const A* t, const A* e_t, int64_t n, A max, A coef, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED { return old + coef * exp_1<kT>(e_t[i], t[i] - max); });
}

// out += w g_t, a target's gradient taken to a network; -> sum g_t (z - max).
template <class A>
KD_MULTIVERSION A add_spread(const A* z, A max, const A* g_t, A w, int64_t n, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED { return old + w * g_t[i]; });
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return weight_term(g_t[i], z[i] - max); });
}

// Takes the gradients of kR targets to one network: out = from + sum_r w_r g_r, which is not where `from` is;
// dots_r += sum g_r (z - max).
template <int kR, class A>
KD_MULTIVERSION void spread_piece(const A* z, A max, const A* const* g, const A* w, int64_t n, const A* from, A* out,
                                  double* dots) {
  // By value: the compiler would read them again after each store.
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

// ---- teachers
template <class A>
struct TeacherSums {
  A sum, dot;
};

// A teacher beside the student, its exponentials kept if kKeep. Without kMasked no logit is -inf, or `dot` is not
// finite.
template <bool kCross, bool kKeep, bool kMasked, class A>
KD_MULTIVERSION TeacherSums<A> teacher_sums(const A* z, const A* student, int64_t n, A max_p, A max_q, A rate,
                                            A* powers) {
  const auto sums = sum_elements<2, A>(n, [&](int64_t i) KD_INLINED {
    const A c_p = z[i] - max_p, c_q = student[i] - max_q, e = exp2(c_p * rate);
    if (kKeep) powers[i] = e;
    return Terms<A>{e, kMasked ? divergence_term(e, c_p, c_q, kCross) : e * (kCross ? -c_q : c_p - c_q)};
  });
  return {sums.a, sums.b};
}

// sum += factor e
template <class A>
KD_MULTIVERSION void add_scaled(const A* e, int64_t n, A factor, A* sum) {
  update_elements(sum, n, [&](int64_t i, A old) KD_INLINED { return old + factor * e[i]; });
}

// Moves the sums of a few rows to those of all; without kAdd they are the first.
template <bool kAdd, class A>
KD_MULTIVERSION void move_sums(A* few, int64_t n, double* all) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    all[i] = (kAdd ? all[i] : 0.0) + static_cast<double>(few[i]);
    few[i] = 0;
  }
}

KD_MULTIVERSION double dot_product(const double* x, const double* y, int64_t n) {
  return sum_each<double>(n, [&](int64_t i) KD_INLINED { return x[i] * y[i]; });
}

// Up to four teachers in a chunk: logits, maxima, and the factors of their exponentials.
template <class A>
struct Pulls {
  const A* z[4];
  A max[4], factor[4];
};

// out = of_q exp2(c rate) + of_1 exp(c), or what it holds if kAdd, less the pulls of kM teachers.
template <int kT, int kM, bool kAdd, class A>
KD_MULTIVERSION void student_grad_piece(const A* z, Pulls<A> p, int64_t n, A max, A rate, A of_q, A of_1, A* out) {
  const A *z_0 = p.z[0], *z_1 = p.z[1], *z_2 = p.z[2], *z_3 = p.z[3];
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED {
    const A c = z[i] - max, e = exp2(c * rate);
    A sum = kAdd ? old : of_q * e + of_1 * exp_1<kT>(e, c);
    if (kM > 0) sum -= p.factor[0] * exp2((z_0[i] - p.max[0]) * rate);
    if (kM > 1) sum -= p.factor[1] * exp2((z_1[i] - p.max[1]) * rate);
    if (kM > 2) sum -= p.factor[2] * exp2((z_2[i] - p.max[2]) * rate);
    if (kM > 3) sum -= p.factor[3] * exp2((z_3[i] - p.max[3]) * rate);
    return sum;
  });
}

template <bool kCross, class A>
KD_MULTIVERSION void teacher_grad_piece(const A* z, const A* student, int64_t n, LogSoftmax<A> p, LogSoftmax<A> q,
                                        A divergence, A scale, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c = (z[i] - p.max) * p.rate;
    out[i] = teacher_term(exp2(c) * p.inverse, c - p.log2_sum, (student[i] - q.max) * q.rate - q.log2_sum, divergence,
                          scale, kCross);
  });
}

template <class A>
KD_MULTIVERSION void raise_to(const A* z, int64_t n, LogSoftmax<A> p, A* top) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A log_p = p(z[i]);
    top[i] = log_p > top[i] ? log_p : top[i];
  });
}

template <class A>
KD_MULTIVERSION void add_below(const A* z, int64_t n, LogSoftmax<A> p, const A* top, A* sum) {
  update_elements(sum, n, [&](int64_t i, A old) KD_INLINED {
    const A log_p = p(z[i]);
    return old + exp2(log_p - (is_masked(top[i]) ? A(0) : top[i]));
  });
}

template <class A>
KD_MULTIVERSION A reverse_sum(const A* z, int64_t n, LogSoftmax<A> q, const A* top, const A* sum, A count) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A log_q = q(z[i]);
    return reverse_term(exp2(log_q), log_q, mean_log(top[i], sum[i], count));
  });
}

template <class A>
KD_MULTIVERSION A near_reverse_sum(const A* z, int64_t n, LogSoftmax<A> q, const A* top, const A* sum, A count) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A log_q = q(z[i]);
    return near_reverse_term(exp2(log_q), log_q, mean_log(top[i], sum[i], count));
  });
}

template <class A>
KD_MULTIVERSION void reverse_grad_piece(const A* z, int64_t n, LogSoftmax<A> q, const A* top, const A* sum, A count,
                                        A kl, A scale, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED {
    const A log_q = q(z[i]);
    return old + reverse_grad(exp2(log_q), log_q, mean_log(top[i], sum[i], count), kl, scale);
  });
}

// ---- rows
// A chunk of every network in one row.
template <class A>
struct Chunk {
  const A* z[kMost];

  void read(const Networks& networks, int64_t row, int64_t begin, int64_t n, const Scratch<A>& scratch, int64_t first) {
    for (int64_t m = 0; m < networks.count; ++m) {
      z[m] = kdfast::read<A>(networks[m], row, begin, n, scratch.piece(first + m));
    }
  }
};

// ---- mixed_logits_kl
template <class A>
struct Mixed {
  Networks networks;
  Mix mix;
  Labels labels;
  int64_t rows, cols, learners, targets;
  A rate, eps;
  bool target_ce;
  MixedStats<A> stats;

  int64_t target_of(int64_t learner) const { return targets == 1 ? 0 : learner; }

  // Of network m in target r.
  A weight(int64_t row, int64_t r, int64_t m) const {
    return mix.is_implied(r, m) ? static_cast<A>(mix.implied(m)) : read<A>(mix.column(row, r), m);
  }

  // Each learner has a target, whose softmax is needed at T alone.
  bool own_targets() const { return targets == learners && !target_ce; }
};

// Sums over a chunk: fast where no logit is -inf, else with care.
template <class A>
Raised<A> all_raised_sums(const A* t, const A* e, int64_t n, LogSoftmax<A> s, A eps) {
  const Raised<A> sums = raised_sums<false>(t, e, n, s, eps);
  return sums.rise - sums.rise == 0 ? sums : raised_sums<true>(t, e, n, s, eps);
}

// f(first, constant count) for kMany of `count` things at a time, and then for those that are left.
template <int kMany, class F>
void for_some(int64_t first, int64_t count, const F& f) {
  for (; first + kMany <= count; first += kMany) f(first, std::integral_constant<int, kMany>{});
  if constexpr (kMany > 1) for_some<kMany - 1>(first, count, f);
}

// Writes the logits of targets r to r + kR in a chunk of the row, and the largest of each to `top`. They have to be
// mixed of the same networks; -> whether they are.
template <int kR, class A>
bool mix_targets(const Mixed<A>& op, int64_t row, int64_t r, const Chunk<A>& chunk, int64_t n, A* const* out, A* top) {
  const A* z[kMost];
  A max[kMost], w[kR * kMost];
  int64_t count = 0;
  for (int64_t m = 0; m < op.networks.count; ++m) {
    int zeros = 0;
    for (int i = 0; i < kR; ++i) {
      const A weight = w[i * kMost + count] = op.weight(row, r + i, m);
      zeros += weight == 0;
    }
    if (zeros == kR) continue;  // adds nothing, also where it is -inf
    if (zeros) return false;
    z[count] = chunk.z[m];
    max[count++] = op.stats.max(m, row);
  }
  for (int i = 0; i < kR && count == 0; ++i) {
    std::fill(out[i], out[i] + n, A(0));
    top[i] = 0;
  }
  for_some<4>(0, count, [&](int64_t first, auto some) {
    if (first == 0) {
      const Terms<A> tops = mix_pieces<some.value, kR>(z, max, w, n, out);
      const A all[] = {tops.a, tops.b, tops.c, tops.d};
      std::copy(all, all + kR, top);
    } else {
      for (int i = 0; i < kR; ++i) {
        mix_more<some.value>(z + first, max + first, w + i * kMost + first, n, out[i]);
        if (first + some.value == count) top[i] = max_of(out[i], n, -infinity<A>());
      }
    }
  });
  return true;
}

// The logits of the one target that takes the least of each class; -> the largest.
template <class A>
A least_target(const Mixed<A>& op, int64_t row, const Chunk<A>& chunk, int64_t n, A* out) {
  A origin[kMost];
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A at_label = read_one<A>(op.networks[m], row, op.labels.at(row));
    origin[m] = is_masked(at_label) ? op.stats.max(m, row) : at_label;
  }
  least_piece(chunk.z, origin, op.networks.count, n, out);
  return max_of(out, n, -infinity<A>());
}

// Writes the logits of all targets in a chunk of the row to pieces of the scratch from `first` on, and the largest of
// each to `top`.
template <class A>
void target_pieces(const Mixed<A>& op, int64_t row, const Chunk<A>& chunk, int64_t n, const Scratch<A>& scratch,
                   int64_t first, A* top) {
  if (!op.mix.data) return *top = least_target(op, row, chunk, n, scratch.piece(first)), void();
  for_some<4>(0, op.targets, [&](int64_t r, auto some) {
    A* out[some.value];
    for (int i = 0; i < some.value; ++i) out[i] = scratch.piece(first + r + i);
    if (mix_targets<some.value>(op, row, r, chunk, n, out, top + r)) return;
    for (int i = 0; i < some.value; ++i) mix_targets<1>(op, row, r + i, chunk, n, out + i, top + r + i);
  });
}

// The logits of one class of a target.
template <class A>
A target_at(const Mixed<A>& op, int64_t row, int64_t r, int64_t col) {
  A t = 0;
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A w = op.weight(row, r, m);
    if (w != 0) t += w * (read_one<A>(op.networks[m], row, col) - op.stats.max(m, row));
  }
  return t;
}

struct TargetState {
  double sum = 0, sum_1 = 0;
  Raised<double> raised;
};

struct LearnerState {
  double sum = 0, sum_1 = 0, kl = 0;
  bool near = false;
  Shared<double> shared;
};

template <class A>
struct Value {
  A kl, ce;
};

template <int kT, bool kEps, class A>
Value<A> mixed_row(const Mixed<A>& op, int64_t row, const Scratch<A>& scratch) {
  const MixedStats<A>& stats = op.stats;
  std::vector<TargetState> targets(op.targets);
  std::vector<LearnerState> learners(op.learners);
  const int64_t count = op.networks.count, logits = count;  // pieces of the scratch
  A* e_t = scratch.piece(count + op.targets);               // exponentials of one target, until the next needs them
  Chunk<A> chunk;
  // A row of one chunk is read and mixed once.
  bool fresh = false;
  const auto load_chunk = [&](int64_t begin, int64_t n) {
    if (fresh && op.cols <= kChunk) return;
    chunk.read(op.networks, row, begin, n, scratch, 0);
    fresh = true;
  };
  A top[kMost];
  bool mixed = false;
  const auto mix_chunk = [&](int64_t begin, int64_t n) {
    if (mixed && op.cols <= kChunk) return;
    load_chunk(begin, n);
    target_pieces(op, row, chunk, n, scratch, logits, top);
    mixed = true;
  };

  for (int64_t m = 0; m < count; ++m) stats.max(m, row) = -infinity<A>();
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    load_chunk(begin, n);
    for (int64_t m = 0; m < count; ++m) stats.max(m, row) = max_of(chunk.z[m], n, stats.max(m, row));
  });
  for (int64_t m = 0; m < count; ++m) stats.max(m, row) = finite_max(stats.max(m, row));

  for (int64_t r = 0; r < op.targets; ++r) stats.target_max(r, row) = -infinity<A>();
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    mix_chunk(begin, n);
    for (int64_t r = 0; r < op.targets; ++r) stats.target_max(r, row) = kdfast::max(stats.target_max(r, row), top[r]);
  });
  for (int64_t r = 0; r < op.targets; ++r) stats.target_max(r, row) = finite_max(stats.target_max(r, row));

  // Once the sum of a target is complete: what eps adds, from the logits and exponentials of a chunk.
  const auto raise = [&](int64_t r, const A* t, int64_t n) {
    const Softmax<A> side{stats.target_max(r, row), static_cast<A>(targets[r].sum)};
    const Raised<A> sums = all_raised_sums(t, e_t, n, LogSoftmax<A>(side, op.rate), op.eps);
    targets[r].raised.rise += sums.rise;
    targets[r].raised.logs += sums.logs;
    targets[r].raised.live += sums.live;
  };
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    mix_chunk(begin, n);
    for (int64_t i = 0; i < op.learners; ++i) {
      prefetch<A>(op.networks[i], row + 1, op.rows, op.cols);
      const int64_t r = op.target_of(i);
      const bool first = i == r;  // of this target's learners
      const A *z = chunk.z[i], *t = scratch.piece(logits + r), max_q = stats.max(i, row),
              max_t = stats.target_max(r, row);
      LearnerSums<A> sums;
      if (op.own_targets()) {
        const OwnSums<A> both = own_sums<kT>(z, t, e_t, n, max_q, max_t, op.rate);
        sums = both.learner;
        targets[r].sum += both.target;
      } else {
        if (first) {
          const ExponentialSums<A> of_target = exponential_sums<kT, true>(t, n, max_t, op.rate, e_t);
          targets[r].sum += of_target.at_t;
          targets[r].sum_1 += of_target.at_1;
        }
        sums = learner_sums<kT, kEps, false>(z, t, e_t, n, max_q, max_t, op.rate);
      }
      if (sums.has_masked()) sums = learner_sums<kT, kEps, true>(z, t, e_t, n, max_q, max_t, op.rate);
      learners[i].sum += sums.sum;
      learners[i].sum_1 += sums.sum_1;
      learners[i].shared.dot += sums.dot;
      learners[i].shared.centred += sums.centred;
      learners[i].shared.extra += sums.extra;
      if (kEps && first && op.cols <= kChunk) raise(r, t, n);
    }
  });
  if (kEps && op.cols > kChunk) {
    for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
      mix_chunk(begin, n);
      for (int64_t r = 0; r < op.targets; ++r) {
        const A* t = scratch.piece(logits + r);
        write_exponentials(t, n, stats.target_max(r, row), op.rate, e_t);
        raise(r, t, n);
      }
    });
  }
  for (int64_t r = 0; r < op.targets; ++r) {
    stats.target_sum(r, row) = static_cast<A>(targets[r].sum);
    stats.target_sum_1(r, row) = static_cast<A>(targets[r].sum_1);
  }

  for (int64_t i = 0; i < op.learners; ++i) {
    const double sum_t = targets[op.target_of(i)].sum;
    learners[i].kl = divergence<double>(sum_t, learners[i].sum, learners[i].shared.dot, op.rate);
    learners[i].near = learners[i].kl < kNear && sum_t > 0;
    if (learners[i].near) learners[i].kl = 0;
  }
  if (std::any_of(learners.begin(), learners.end(), [](const LearnerState& learner) { return learner.near; })) {
    for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
      mix_chunk(begin, n);
      for (int64_t i = 0; i < op.learners; ++i) {
        if (!learners[i].near) continue;
        const int64_t r = op.target_of(i);
        const NearRow<A> near(stats.target_max(r, row), stats.max(i, row), targets[r].sum, learners[i].sum, op.rate,
                              false);
        learners[i].kl += near_sum(scratch.piece(logits + r), chunk.z[i], n, near);
      }
    });
  }

  Value<A> value{0, 0};
  for (int64_t i = 0; i < op.learners; ++i) {
    const int64_t r = op.target_of(i);
    const EpsKl<double> kl = eps_kl<double>(learners[i].kl, targets[r].sum, learners[i].sum, targets[r].raised,
                                            learners[i].shared, op.rate, op.eps);
    stats.sum(i, row) = static_cast<A>(learners[i].sum);
    stats.sum_1(i, row) = static_cast<A>(learners[i].sum_1);
    stats.mass(i, row) = static_cast<A>(kl.mass);
    stats.slope(i, row) = static_cast<A>(kl.slope);
    value.kl += static_cast<A>(kl.value);
  }
  if (!op.labels.index) return value;
  const int64_t label = op.labels.at(row);
  for (int64_t i = 0; i < op.learners; ++i) {
    const A at_label = read_one<A>(op.networks[i], row, label) - stats.max(i, row);
    value.ce += static_cast<A>(cross_entropy<double>(learners[i].sum_1, at_label));
  }
  for (int64_t r = 0; op.target_ce && r < op.targets; ++r) {
    const A at_label = target_at(op, row, r, label) - stats.target_max(r, row);
    value.ce += static_cast<A>(cross_entropy<double>(targets[r].sum_1, at_label));
  }
  return value;
}

template <class A>
struct MixedGrad {
  A kl, ce;  // of the divergences over T, of the cross-entropies
  bool through_targets, flows;
  Matrix out[kMost];
  Mix mix_grad;

  // The divergence of learner m is all that pulls at its target.
  bool alone(const Mixed<A>& op, int64_t row, int64_t m) const {
    return through_targets && kl != 0 && op.own_targets() && op.stats.slope(m, row) != infinity<A>();
  }

  // The gradient of the only target is complete before its learners', and taken to them on the way.
  bool at_once(const Mixed<A>& op) const {
    return flows && !through_targets && op.targets == 1 && op.learners == op.networks.count;
  }
};

// Writes the gradients of all targets, taken to network m and added to its `own`. Two pieces of the scratch from
// `spare` on are overwritten.
template <class A>
void spread(const Mixed<A>& op, const Matrix& out, int64_t row, int64_t begin, int64_t m, const A* z, int64_t n,
            const Scratch<A>& scratch, int64_t target_grads, const A* own, int64_t spare, double* dots) {
  const A* g[kMost];
  A w[kMost];
  for (int64_t r = 0; r < op.targets; ++r) {
    g[r] = scratch.piece(target_grads + r);
    w[r] = op.weight(row, r, m);
  }
  const A max = op.stats.max(m, row);
  A *to = scratch.piece(spare), *next = scratch.piece(spare + 1);
  for_some<5>(0, op.targets, [&](int64_t r, auto some) {
    if (r + some.value == op.targets) to = target(out, row, begin, to);
    spread_piece<some.value>(z, max, g + r, w + r, n, own, to, dots ? dots + r : nullptr);
    own = to;
    std::swap(to, next);
  });
  write(out, row, begin, n, own);
}

// Writes the gradient of learner m in a chunk, beside its target's logits and exponentials, but for the label. What the
// divergence pulls at the target is added to `target_grad`; or that is taken to the learner, -> its part of the
// gradient of mix.
template <int kT, bool kEps, class A>
A learner_grads(const Mixed<A>& op, const MixedGrad<A>& grad, int64_t row, int64_t m, const A* z, const A* t,
                const A* e_t, int64_t n, A* target_grad, A* out) {
  const MixedStats<A>& stats = op.stats;
  const int64_t r = op.target_of(m);
  const Softmax<A> learner = stats.learner(m, row), target = stats.target(r, row);
  const LearnerGrad<A> g = learner_grad(target, learner, stats.sum_1(m, row), stats.mass(m, row), op.eps, grad.kl,
                                        op.labels.index ? grad.ce : A(0));
  const A slope = A(kLog2E) * stats.slope(m, row);
  if (grad.kl == 0) {  // whatever the target is
    ce_piece<kT>(z, n, learner.max, op.rate, g.of_1, out);
    if (!grad.at_once(op)) return 0;
    return add_spread(z, learner.max, target_grad, op.weight(row, 0, m), n, out);
  }
  if (grad.through_targets && slope != infinity<A>()) {
    const LogSoftmax<A> q(learner, op.rate), p(target, op.rate);
    const auto piece =
        grad.alone(op, row, m) ? both_grads_piece<kT, kEps, false, A> : both_grads_piece<kT, kEps, true, A>;
    piece(z, t, e_t, n, q, p, g, op.eps, slope, grad.kl, out, target_grad);
  } else if (grad.at_once(op)) {
    const A w = op.weight(row, 0, m);
    return learner_spread_piece<kT, kEps>(z, t, e_t, target_grad, n, learner.max, op.rate, g, w, out);
  } else {
    learner_grad_piece<kT, kEps>(z, t, e_t, n, learner.max, op.rate, g, out);
  }
  return 0;
}

// Of a loss without weight, whatever the networks are.
template <class A>
void write_no_grads(const Mixed<A>& op, const MixedGrad<A>& grad, int64_t row, int64_t written, A* zeros) {
  std::fill(zeros, zeros + kChunk, A(0));
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    for (int64_t m = 0; m < written; ++m) write(grad.out[m], row, begin, n, zeros);
  });
  for (int64_t r = 0; r < grad.mix_grad.targets; ++r) {
    const Column to = grad.mix_grad.column(row, r);
    for (int64_t m = 0; m < grad.mix_grad.networks; ++m) write_one(Matrix{to.data, to.dtype, 0, 1}, 0, m, A(0));
  }
}

template <int kT, class A>
void mixed_grad_row(const Mixed<A>& op, const MixedGrad<A>& grad, int64_t row, const Scratch<A>& scratch) {
  const MixedStats<A>& stats = op.stats;
  const int64_t count = op.networks.count, written = grad.flows ? count : op.learners;
  const int64_t logits = count, target_grads = logits + op.targets, outs = target_grads + op.targets;
  A* e_t = scratch.piece(outs + count + 2);  // exponentials of one target, until the next needs them
  const int64_t label = op.labels.index ? op.labels.at(row) : -1;
  std::vector<double> dots(grad.mix_grad.data ? count * op.targets : 0, 0.0);
  A top[kMost];
  Chunk<A> chunk;
  if (grad.kl == 0 && grad.ce == 0) return write_no_grads(op, grad, row, written, scratch.piece(0));
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    const int64_t at = label - begin;
    const bool has_label = at >= 0 && at < n;
    chunk.read(op.networks, row, begin, n, scratch, 0);
    target_pieces(op, row, chunk, n, scratch, logits, top);
    // Whether the targets' gradients are taken to a network once they are complete.
    const auto takes = [&](int64_t m) { return grad.flows && !grad.at_once(op) && m != op.mix.leader; };
    const auto prepare = [&](int64_t r) {
      A *t = scratch.piece(logits + r), *g = scratch.piece(target_grads + r);
      write_exponentials(t, n, stats.target_max(r, row), op.rate, e_t);
      if (!grad.flows || grad.alone(op, row, r)) return;
      std::fill(g, g + n, A(0));
      if (op.target_ce) {
        const A coef = of_1(grad.ce, stats.target_sum_1(r, row));
        ce_grad_piece<kT>(t, e_t, n, stats.target_max(r, row), coef, g);
        if (has_label) g[at] -= grad.ce;
      }
    };
    for (int64_t m = 0; m < written; ++m) {
      A* own = scratch.piece(outs + m);  // what network m takes is added to it later, so it is no other's
      A* out = takes(m) ? own : target(grad.out[m], row, begin, own);
      if (m < op.learners) {
        const int64_t r = op.target_of(m);
        if (m == r) prepare(r);  // its first learner
        const auto piece = op.eps == 0 ? learner_grads<kT, false, A> : learner_grads<kT, true, A>;
        const A dot = piece(op, grad, row, m, chunk.z[m], scratch.piece(logits + r), e_t, n,
                            scratch.piece(target_grads + r), out);
        if (grad.mix_grad.data) dots[m * op.targets] += dot;
        if (has_label) out[at] -= grad.ce;
      } else {
        std::fill(out, out + n, A(0));
      }
      if (!takes(m)) write(grad.out[m], row, begin, n, out);
    }
    // A target's gradient is complete after its last learner.
    for (int64_t m = 0; m < count; ++m) {
      if (!takes(m)) continue;
      spread(op, grad.out[m], row, begin, m, chunk.z[m], n, scratch, target_grads, scratch.piece(outs + m),
             outs + count, grad.mix_grad.data ? dots.data() + m * op.targets : nullptr);
    }
  });
  for (int64_t m = 0; m < grad.mix_grad.networks; ++m) {
    for (int64_t r = 0; r < grad.mix_grad.targets; ++r) {
      const Column to = grad.mix_grad.column(row, r);
      write_one(Matrix{to.data, to.dtype, 0, 1}, 0, m, static_cast<A>(dots[m * op.targets + r]));
    }
  }
}

// ---- teachers_kl
template <class A>
struct Taught {
  Matrix student;
  Networks teachers;
  Labels labels;
  int64_t rows, cols;
  A rate;
  Kind kind;
  TeacherStats<A> stats;

  bool cross() const { return kind == Kind::kCrossEntropy; }
};

// The student and its teachers in a chunk of a row; pieces 0 to M of the scratch.
template <class A>
const A* read_all(const Taught<A>& op, int64_t row, int64_t begin, int64_t n, const Scratch<A>& scratch,
                  Chunk<A>& chunk) {
  chunk.read(op.teachers, row, begin, n, scratch, 1);
  return read<A>(op.student, row, begin, n, scratch.piece(0));
}

// Sums over a chunk: fast where no logit is -inf, else with care.
template <bool kKeep, class A>
TeacherSums<A> all_teacher_sums(bool cross, const A* z, const A* student, int64_t n, A max_p, A max_q, A rate,
                                A* powers) {
  const auto fast = cross ? teacher_sums<true, kKeep, false, A> : teacher_sums<false, kKeep, false, A>;
  const TeacherSums<A> sums = fast(z, student, n, max_p, max_q, rate, powers);
  if (sums.dot - sums.dot == 0) return sums;
  const auto careful = cross ? teacher_sums<true, kKeep, true, A> : teacher_sums<false, kKeep, true, A>;
  return careful(z, student, n, max_p, max_q, rate, powers);
}

// log r of a chunk as its largest logarithm and a sum, see mean_log.
template <class A>
void mean_pieces(const Taught<A>& op, int64_t row, const Chunk<A>& chunk, int64_t n, A* top, A* sum) {
  std::fill(top, top + n, -infinity<A>());
  std::fill(sum, sum + n, A(0));
  for (int64_t m = 0; m < op.teachers.count; ++m) {
    raise_to(chunk.z[m], n, LogSoftmax<A>(op.stats.teacher(m, row), op.rate), top);
  }
  for (int64_t m = 0; m < op.teachers.count; ++m) {
    add_below(chunk.z[m], n, LogSoftmax<A>(op.stats.teacher(m, row), op.rate), top, sum);
  }
}

// Statistics of one row; -> its cross-entropy. If kKeep the exponentials of its last chunk stay in the pieces from M +
// 1 on.
template <int kT, bool kKeep, class A>
A taught_row(const Taught<A>& op, int64_t row, const Scratch<A>& scratch) {
  const TeacherStats<A>& stats = op.stats;
  const int64_t count = op.teachers.count, top = count + 1, sum = count + 2;
  Chunk<A> chunk;
  const A* z = nullptr;
  bool fresh = false;
  const auto load_chunk = [&](int64_t begin, int64_t n) {
    if (fresh && op.cols <= kChunk) return;
    z = read_all(op, row, begin, n, scratch, chunk);
    fresh = true;
  };
  A max_q = -infinity<A>(), max_p[kMost];
  std::fill(max_p, max_p + count, -infinity<A>());
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    load_chunk(begin, n);
    max_q = max_of(z, n, max_q);
    for (int64_t m = 0; m < count; ++m) max_p[m] = max_of(chunk.z[m], n, max_p[m]);
  });
  max_q = finite_max(max_q);
  double sum_q = 0, sum_1 = 0, sum_p[kMost] = {}, dot[kMost] = {};
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    load_chunk(begin, n);
    prefetch<A>(op.student, row + 1, op.rows, op.cols);
    const ExponentialSums<A> sums = exponential_sums<kT, kKeep>(z, n, max_q, op.rate, scratch.piece(top));
    sum_q += sums.at_t;
    sum_1 += sums.at_1;
    for (int64_t m = 0; m < count; ++m) {
      prefetch<A>(op.teachers[m], row + 1, op.rows, op.cols);
      const A max = finite_max(max_p[m]);
      const TeacherSums<A> one =
          all_teacher_sums<kKeep>(op.cross(), chunk.z[m], z, n, max, max_q, op.rate, scratch.piece(top + 1 + m));
      sum_p[m] += one.sum;
      dot[m] += one.dot;
    }
  });
  stats.at(0, row) = max_q;
  stats.at(1, row) = static_cast<A>(sum_q);
  stats.sum_1(row) = static_cast<A>(sum_1);
  for (int64_t m = 0; m < count; ++m) {
    stats.set_teacher(m, row, {finite_max(max_p[m]), static_cast<A>(sum_p[m])});
    if (op.kind == Kind::kReverse) {
      stats.value(m, row) = 0;
      continue;
    }
    double value = divergence<double>(sum_p[m], sum_q, dot[m], static_cast<double>(op.rate), op.cross());
    if (op.kind == Kind::kKl && value < kNear && sum_p[m] > 0) {
      const NearRow<A> near(finite_max(max_p[m]), max_q, sum_p[m], sum_q, op.rate, true);
      value = 0;
      for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
        load_chunk(begin, n);
        value += near_sum(chunk.z[m], z, n, near);
      });
    }
    stats.value(m, row) = static_cast<A>(value);
  }
  if (op.kind == Kind::kReverse) {
    double kl = 0;
    for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
      load_chunk(begin, n);
      mean_pieces(op, row, chunk, n, scratch.piece(top), scratch.piece(sum));
      kl += kLn2 * reverse_sum(z, n, LogSoftmax<A>(stats.student(row), op.rate), scratch.piece(top), scratch.piece(sum),
                               static_cast<A>(count));
    });
    if (kl < kNear && sum_q > 0) {
      kl = 0;
      for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
        load_chunk(begin, n);
        mean_pieces(op, row, chunk, n, scratch.piece(top), scratch.piece(sum));
        kl += near_reverse_sum(z, n, LogSoftmax<A>(stats.student(row), op.rate), scratch.piece(top), scratch.piece(sum),
                               static_cast<A>(count));
      });
    }
    stats.value(0, row) = static_cast<A>(kl);
  }
  if (!op.labels.index) return 0;
  const A at_label = read_one<A>(op.student, row, op.labels.at(row)) - max_q;
  return static_cast<A>(cross_entropy<double>(sum_1, at_label));
}

template <class A>
A row_value(const Taught<A>& op, const std::vector<A>& weights, int64_t row) {
  if (op.kind == Kind::kReverse) return op.stats.value(0, row);
  A value = 0;
  for (int64_t m = 0; m < op.teachers.count; ++m) value += weighed(weights[m], op.stats.value(m, row));
  return value;
}

template <int kT, class A>
void taught_grad_row(const Taught<A>& op, const std::vector<A>& weights, A kl, A ce, int64_t row,
                     const Scratch<A>& scratch, const Matrix& to_student, const std::vector<Matrix>& to_teachers) {
  const TeacherStats<A>& stats = op.stats;
  const int64_t count = op.teachers.count, top = count + 1, sum = count + 2, buffer = count + 3;
  const Softmax<A> student = stats.student(row);
  const LogSoftmax<A> q(student, op.rate);
  const A coef_1 = op.labels.index ? of_1(ce, stats.sum_1(row)) : A(0);
  // A teacher without weight adds 0 whatever it is.
  int64_t active[kMost], actives = 0;
  A of_q = 0;
  for (int64_t m = 0; op.kind != Kind::kReverse && m < count; ++m) {
    if (kl * weights[m] == 0) continue;
    active[actives++] = m;
    of_q += stats.teacher(m, row).sum == 0 ? A(0) : kl * weights[m] * q.inverse;
  }
  const bool reverse = op.kind == Kind::kReverse && kl != 0;
  Chunk<A> chunk;
  for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
    const A* z = read_all(op, row, begin, n, scratch, chunk);
    if (to_student.data) {
      A* out = target(to_student, row, begin, scratch.piece(buffer));
      if (actives == 0 && coef_1 == 0) {
        std::fill(out, out + n, A(0));
      } else if (actives == 0) {
        student_grad_piece<kT, 0, false>(z, Pulls<A>{}, n, q.max, op.rate, of_q, coef_1, out);
      }
      if (reverse) {
        mean_pieces(op, row, chunk, n, scratch.piece(top), scratch.piece(sum));
        reverse_grad_piece(z, n, q, scratch.piece(top), scratch.piece(sum), static_cast<A>(count),
                           A(kLog2E) * stats.value(0, row), A(kLn2) * kl, out);
      } else {
        for_some<4>(0, actives, [&](int64_t first, auto some) {
          Pulls<A> pulls{};
          for (int64_t i = 0; i < some.value; ++i) {
            const int64_t m = active[first + i];
            const Softmax<A> p = stats.teacher(m, row);
            pulls.z[i] = chunk.z[m];
            pulls.max[i] = p.max;
            pulls.factor[i] = kl * weights[m] * p.inverse();
          }
          const auto piece =
              first ? student_grad_piece<kT, some.value, true, A> : student_grad_piece<kT, some.value, false, A>;
          piece(z, pulls, n, q.max, op.rate, of_q, coef_1, out);
        });
      }
      const int64_t at = op.labels.index ? op.labels.at(row) - begin : -1;
      if (at >= 0 && at < n) out[at] -= ce;
      write(to_student, row, begin, n, out);
    }
    for (int64_t m = 0; m < static_cast<int64_t>(to_teachers.size()); ++m) {
      A* out = target(to_teachers[m], row, begin, scratch.piece(buffer));
      const A value = stats.value(m, row);
      const LogSoftmax<A> p(stats.teacher(m, row), op.rate);
      const A scale = value == infinity<A>() ? A(0) : A(kLn2) * kl * weights[m];
      if (scale == 0) {
        std::fill(out, out + n, A(0));
      } else if (op.cross()) {
        teacher_grad_piece<true>(chunk.z[m], z, n, p, q, A(kLog2E) * value, scale, out);
      } else {
        teacher_grad_piece<false>(chunk.z[m], z, n, p, q, A(kLog2E) * value, scale, out);
      }
      write(to_teachers[m], row, begin, n, out);
    }
  });
}

// ---- aekd
// Rows are added up in blocks by one thread each, at most kBlocks of them and of at least kBlockRows rows.
constexpr int64_t kBlocks = 16, kBlockRows = 32;
constexpr int64_t kFew = 16;  // rows that are added up in the type of the logits, before they go to a double

// G of sum_b (q - p_m); the statistics of the rows on the way. Sums of probabilities: the student's, then the
// teachers'.
template <class A>
std::vector<double> gradient_gram(const Taught<A>& op) {
  const int64_t count = op.teachers.count, cols = op.cols, size = (count + 1) * cols;
  const int64_t per_block = std::max<int64_t>(kBlockRows, (op.rows + kBlocks - 1) / kBlocks);
  const int64_t blocks = (op.rows + per_block - 1) / per_block;
  const std::unique_ptr<double[]> sums(new double[std::max<int64_t>(blocks, 1) * size]);
  for_each(blocks, 1, [&](int64_t block) {
    const Scratch<A> scratch(2 * count + 2);
    double* sum = sums.get() + block * size;
    std::vector<A> few(size, A(0));
    const int64_t first = block * per_block, end = std::min(op.rows, first + per_block);
    for (int64_t row = first; row < end; ++row) {
      taught_row<1, true>(op, row, scratch);
      Chunk<A> chunk;
      for_pieces(0, cols, [&](int64_t begin, int64_t n) {
        const A* z = cols > kChunk ? read_all(op, row, begin, n, scratch, chunk) : nullptr;
        for (int64_t i = 0; i <= count; ++i) {
          const Softmax<A> side = i ? op.stats.teacher(i - 1, row) : op.stats.student(row);
          A* e = scratch.piece(count + 1 + i);
          if (z) write_exponentials(i ? chunk.z[i - 1] : z, n, side.max, op.rate, e);
          add_scaled(e, n, side.inverse(), few.data() + i * cols + begin);
        }
      });
      if ((row - first) % kFew == kFew - 1 || row + 1 == end) {
        const auto move = row - first < kFew ? move_sums<false, A> : move_sums<true, A>;
        move(few.data(), size, sum);
      }
    }
  });
  for_each((size + kChunk - 1) / kChunk, 4, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(size, begin + kChunk);
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[block * size + i];
    }
  });
  std::vector<double> gram(count * count, 0.0);
  if (blocks == 0) return gram;
  for (int64_t m = 1; m <= count; ++m) {
    for (int64_t c = 0; c < cols; ++c) sums[m * cols + c] = sums[c] - sums[m * cols + c];
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      gram[i * count + j] = gram[j * count + i] =
          dot_product(sums.get() + (i + 1) * cols, sums.get() + (j + 1) * cols, cols);
    }
  }
  return gram;
}

// ---- the ops
using Pair = std::tuple<Tensor, Tensor>;

template <class A>
Mixed<A> mixed_of(const std::vector<Tensor>& networks, const std::optional<Tensor>& mix,
                  const std::optional<Tensor>& labels, int64_t learners, double temperature, double eps, bool target_ce,
                  const Tensor& stats) {
  const int64_t rows = networks[0].size(0), count = static_cast<int64_t>(networks.size());
  const int64_t targets = targets_of(mix, count);
  return {networks_of(networks),
          mix_of(mix, count),
          labels_of(labels),
          rows,
          networks[0].size(1),
          learners,
          targets,
          A(kLog2E / temperature),
          A(eps),
          target_ce,
          MixedStats<A>{static_cast<A*>(stats.data_ptr()), rows, count, learners, targets}};
}

// The temperature, of a tensor that one read gives.
double value_of(const std::optional<Tensor>& tensor, double number) {
  return tensor ? read<double>(column(*tensor), 0) : number;
}

Pair mixed_forward_cpu(std::vector<Tensor> networks, std::optional<Tensor> mix, std::optional<Tensor> labels,
                       std::optional<Tensor> ramp, std::optional<Tensor> temperatures, int64_t learners,
                       double temperature, double eps, double kl_scale, double ce_scale, int64_t divisor,
                       bool target_ce) {
  const int64_t rows = networks[0].size(0), cols = networks[0].size(1);
  const int64_t count = static_cast<int64_t>(networks.size()), targets = targets_of(mix, count);
  check_labels(labels_of(labels), rows, cols);
  const ScalarType dtype = accumulator(networks, mix);
  Tensor loss = empty(networks[0], dtype, {});
  Tensor stats = empty(networks[0], dtype, {mixed_stats(count, learners, targets), rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const double t = value_of(temperatures, temperature);
    const auto op = mixed_of<A>(networks, mix, labels, learners, t, eps, target_ce, stats);
    std::vector<A> values(rows);
    const A kl = static_cast<A>(kl_scale / divisor * t * t * value_of(ramp, 1)),
            ce = static_cast<A>(ce_scale / divisor);
    dispatch_temperature<1, 2, 3, 4>(op.rate, [&](auto t_1) {
      for_rows<A>(rows, cols, count, count + targets + 1, [&](int64_t row, const Scratch<A>& scratch) {
        const Value<A> v =
            op.eps == 0 ? mixed_row<t_1.value, false>(op, row, scratch) : mixed_row<t_1.value, true>(op, row, scratch);
        values[row] = weighed(kl, v.kl) + weighed(ce, v.ce);
      });
    });
    reduce_rows(rows, true, static_cast<A*>(loss.data_ptr()), [&](int64_t row) { return values[row]; });
  });
  return {loss, stats};
}

Pair mixed_backward_cpu(Tensor grad, std::vector<Tensor> networks, std::optional<Tensor> mix,
                        std::optional<Tensor> labels, std::optional<Tensor> ramp, std::optional<Tensor> temperatures,
                        Tensor stats, int64_t learners, double temperature, double eps, double kl_scale,
                        double ce_scale, int64_t divisor, bool target_ce, bool through_targets, bool need_mix) {
  const int64_t rows = networks[0].size(0), cols = networks[0].size(1);
  const int64_t count = static_cast<int64_t>(networks.size()), targets = targets_of(mix, count);
  const bool flows = through_targets || target_ce;
  const int64_t written = flows ? count : learners;
  Tensor grads = empty(networks[0], networks[0].scalar_type(), {written, rows, cols});
  Tensor mix_grad = need_mix ? empty(*mix, mix->scalar_type(), {rows, mix->size(1), mix->size(2)})
                             : empty(grad, grad.scalar_type(), {0});
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    const double t = value_of(temperatures, temperature);
    const auto op = mixed_of<A>(networks, mix, labels, learners, t, eps, target_ce, stats);
    const double upstream = read<double>(column(grad), 0);
    MixedGrad<A> g;
    g.kl = static_cast<A>(upstream * (kl_scale / divisor * t) * value_of(ramp, 1));
    g.ce = labels ? static_cast<A>(upstream * ce_scale / divisor) : A(0);
    g.through_targets = through_targets;
    g.flows = flows;
    g.mix_grad = need_mix ? mix_of(mix_grad, count) : Mix{};
    for (int64_t m = 0; m < written; ++m) {
      g.out[m] = {static_cast<char*>(grads.data_ptr()) + m * rows * cols * grads.element_size(), grads.scalar_type(),
                  cols, 1};
    }
    dispatch_temperature<1, 2, 3, 4>(op.rate, [&](auto t_1) {
      for_rows<A>(rows, cols, count, 2 * count + 2 * targets + 3,
                  [&](int64_t row, const Scratch<A>& scratch) { mixed_grad_row<t_1.value>(op, g, row, scratch); });
    });
  });
  return {grads, mix_grad};
}

template <class A>
Taught<A> taught_of(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& labels,
                    Kind kind, double temperature, const Tensor& stats) {
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  return {matrix(student),
          networks_of(teachers),
          labels_of(labels),
          rows,
          student.size(1),
          A(kLog2E / temperature),
          kind,
          TeacherStats<A>{static_cast<A*>(stats.data_ptr()), rows, count}};
}

template <class A>
std::vector<A> weights_of(const std::optional<Tensor>& weight, int64_t count) {
  std::vector<A> weights(count, A(1));
  for (int64_t m = 0; weight && m < count; ++m) weights[m] = read<A>(column(*weight), m);
  return weights;
}

// Runs the rows of the forward; -> their cross-entropies.
template <class A>
std::vector<A> taught_rows(const Taught<A>& op) {
  std::vector<A> ce(op.rows);
  const int64_t count = op.teachers.count;
  dispatch_temperature<1, 2, 3, 4>(op.rate, [&](auto t_1) {
    for_rows<A>(op.rows, op.cols, count + 1, 2 * count + 2, [&](int64_t row, const Scratch<A>& scratch) {
      ce[row] = taught_row<t_1.value, false>(op, row, scratch);
    });
  });
  return ce;
}

Pair teachers_forward_cpu(Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                          std::optional<Tensor> weight, std::optional<Tensor> temperatures, std::string kind,
                          double temperature, double scale, int64_t divisor, double ce_scale, int64_t ce_divisor) {
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  check_labels(labels_of(labels), rows, student.size(1));
  const ScalarType dtype = accumulator(teachers, student);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {teacher_stats(count), rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const double t = value_of(temperatures, temperature);
    const auto op = taught_of<A>(student, teachers, labels, kind_of(kind), t, stats);
    std::vector<A> values = taught_rows(op);
    const std::vector<A> weights = weights_of<A>(weight, count);
    const A kl = static_cast<A>(scale / divisor * t * t), ce = labels ? static_cast<A>(ce_scale / ce_divisor) : A(0);
    for (int64_t row = 0; row < rows; ++row) {
      values[row] = weighed(kl, row_value(op, weights, row)) + weighed(ce, values[row]);
    }
    reduce_rows(rows, true, static_cast<A*>(loss.data_ptr()), [&](int64_t row) { return values[row]; });
  });
  return {loss, stats};
}

Pair teachers_backward_cpu(Tensor grad, Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                           std::optional<Tensor> weight, std::optional<Tensor> temperatures, Tensor stats,
                           std::string kind, double temperature, double scale, int64_t divisor, double ce_scale,
                           int64_t ce_divisor, bool need_student, bool need_teachers) {
  const int64_t rows = student.size(0), cols = student.size(1), count = static_cast<int64_t>(teachers.size());
  Tensor to_student =
      need_student ? empty(student, student.scalar_type(), {rows, cols}) : empty(grad, grad.scalar_type(), {0});
  Tensor to_teachers = need_teachers ? empty(teachers[0], teachers[0].scalar_type(), {count, rows, cols})
                                     : empty(grad, grad.scalar_type(), {0});
  std::vector<Matrix> outs(need_teachers ? count : 0);
  for (int64_t m = 0; m < static_cast<int64_t>(outs.size()); ++m) {
    outs[m] = {static_cast<char*>(to_teachers.data_ptr()) + m * rows * cols * to_teachers.element_size(),
               to_teachers.scalar_type(), cols, 1};
  }
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    const double t = value_of(temperatures, temperature);
    const auto op = taught_of<A>(student, teachers, labels, kind_of(kind), t, stats);
    const std::vector<A> weights = weights_of<A>(weight, count);
    const double upstream = read<double>(column(grad), 0);
    const A kl = static_cast<A>(upstream * (scale / divisor * t)),
            ce = static_cast<A>(upstream * ce_scale / ce_divisor);
    const Matrix student_out = need_student ? matrix(to_student) : Matrix{};
    dispatch_temperature<1, 2, 3, 4>(op.rate, [&](auto t_1) {
      for_rows<A>(rows, cols, count + 1, count + 4, [&](int64_t row, const Scratch<A>& scratch) {
        taught_grad_row<t_1.value>(op, weights, kl, ce, row, scratch, student_out, outs);
      });
    });
  });
  return {to_student, to_teachers};
}

std::tuple<Tensor, Tensor, Tensor> aekd_forward_cpu(Tensor student, std::vector<Tensor> teachers,
                                                    std::optional<Tensor> temperatures, double temperature,
                                                    double scale, int64_t divisor, double slack, bool normalize) {
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  const ScalarType dtype = accumulator(teachers, student);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {teacher_stats(count), rows}),
         weights = empty(student, dtype, {count});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const double t = value_of(temperatures, temperature);
    const auto op = taught_of<A>(student, teachers, std::nullopt, Kind::kKl, t, stats);
    std::vector<A> values(rows), rounded(count);
    std::vector<double> gram = gradient_gram(op), memory(simplex_memory(count)), lengths(count), exact(count);
    aekd_weights(gram.data(), count, slack, normalize, memory.data(), lengths.data(), exact.data());
    for (int64_t m = 0; m < count; ++m) rounded[m] = static_cast<A*>(weights.data_ptr())[m] = static_cast<A>(exact[m]);
    for (int64_t row = 0; row < rows; ++row)
      values[row] = weighed(A(scale / divisor * t * t), row_value(op, rounded, row));
    reduce_rows(rows, true, static_cast<A*>(loss.data_ptr()), [&](int64_t row) { return values[row]; });
  });
  return {loss, stats, weights};
}

Tensor simplex_minimum_cpu(Tensor gram, Tensor slope, double cap) {
  const int64_t count = slope.size(0);
  Tensor a = empty(slope, ScalarType::Double, {count});
  std::vector<double> g(count * count), s(count), memory(simplex_memory(count));
  for (int64_t i = 0; i < count; ++i) {
    s[i] = read<double>(column(slope), i);
    for (int64_t j = 0; j < count; ++j) g[i * count + j] = read_one<double>(matrix(gram), i, j);
  }
  simplex_minimum(g.data(), s.data(), count, cap, memory.data(), static_cast<double*>(a.data_ptr()));
  return a;
}

}  // namespace
}  // namespace ensemble
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  using namespace kdfast::ensemble;
  m.impl("mixed_logits_kl", TORCH_BOX(&mixed_forward_cpu));
  m.impl("mixed_logits_kl_backward", TORCH_BOX(&mixed_backward_cpu));
  m.impl("teachers_kl", TORCH_BOX(&teachers_forward_cpu));
  m.impl("teachers_kl_backward", TORCH_BOX(&teachers_backward_cpu));
  m.impl("aekd", TORCH_BOX(&aekd_forward_cpu));
  m.impl("simplex_minimum", TORCH_BOX(&simplex_minimum_cpu));
}
