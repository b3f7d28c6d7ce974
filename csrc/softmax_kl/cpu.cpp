#include <algorithm>
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "common/logit_rows.h"
#include "softmax_kl/host.h"

namespace kdfast {
namespace softmax_kl {
namespace {

// ---- pieces of a row
template <class A>
struct KlSums {
  A p, q, dot, q_1;
};

// Without kMasked no logit may be masked, else `dot` is not finite.
template <bool kMasked, class A>
KlSums<A> kl_sums(const A* z_p, const A* z_q, int64_t n, A max_p, A max_q, A rate) {
  const auto sums = sum_elements<3, A>(n, [&](int64_t i) KD_INLINED {
    const A c_p = z_p[i] - max_p, c_q = z_q[i] - max_q, e_p = exp2(c_p * rate);
    return Terms<A>{e_p, exp2(c_q * rate), kMasked ? kl_term(e_p, c_p - c_q) : e_p * (c_p - c_q)};
  });
  return {sums.a, sums.b, sums.c, 0};
}

// The same, and the sum q_1 of q's exponentials at temperature 1.
template <int kT, bool kMasked, class A>
KlSums<A> kl_ce_sums(const A* z_p, const A* z_q, int64_t n, A max_p, A max_q, A rate) {
  const auto sums = sum_elements<4, A>(n, [&](int64_t i) KD_INLINED {
    const A c_p = z_p[i] - max_p, c_q = z_q[i] - max_q, e_p = exp2(c_p * rate), e_q = exp2(c_q * rate);
    return Terms<A>{e_p, e_q, kMasked ? kl_term(e_p, c_p - c_q) : e_p * (c_p - c_q), exp_1<kT>(e_q, c_q)};
  });
  return {sums.a, sums.b, sums.c, sums.d};
}

template <class A>
A centred_sum(const A* z, int64_t n, A max) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return z[i] - max; });
}

template <class A>
struct TargetSums {
  A dot, mass;
};

template <class A>
TargetSums<A> target_sums(const A* z, const A* target, int64_t n, A max) {
  const auto sums = sum_elements<2, A>(
      n, [&](int64_t i) KD_INLINED { return Terms<A>{target_term(target[i], z[i] - max), target[i]}; });
  return {sums.a, sums.b};
}

template <class A>
struct MixtureSums {
  A p, q;
};

// e: the exponentials of z - max.
template <class A>
MixtureSums<A> mixture_sums(const A* z_p, const A* z_q, const A* e_p, const A* e_q, int64_t n, LogSoftmax<A> p,
                            LogSoftmax<A> q, A of_p, A of_q) {
  const auto sums = sum_elements<2, A>(n, [&](int64_t i) KD_INLINED {
    const Mixture<A> m = mixture(e_p[i] * p.inverse, e_q[i] * q.inverse, p(z_p[i]), q(z_q[i]), of_p, of_q);
    return Terms<A>{mixture_term(m.p, m.p_ratio), mixture_term(m.q, m.q_ratio)};
  });
  return {sums.a, sums.b};
}

// The same of near rows, in nats.
template <class A>
MixtureSums<A> near_mixture_sums(const A* z_p, const A* z_q, int64_t n, LogSoftmax<A> p, LogSoftmax<A> q, A of_p,
                                 A of_q) {
  const A log2_ratio = p.log2_sum - q.log2_sum;
  const auto sums = sum_elements<2, A>(n, [&](int64_t i) KD_INLINED {
    const Mixture<A> m = mixture(p(z_p[i]), q(z_q[i]), of_p, of_q);
    const A d = A(kLn2) * (centred_gap(z_p[i], z_q[i], p.max, q.max) * p.rate - log2_ratio);
    const NearMixture<A> near = near_mixture(m, d, of_p, of_q);
    return Terms<A>{near.p, near.q};
  });
  return {sums.a, sums.b};
}

template <class A>
void kl_grad_q_piece(const A* z_p, const A* z_q, int64_t n, A max_p, A max_q, A rate, KlGrad<A> g, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    out[i] = kl_grad_q(g, exp2((z_p[i] - max_p) * rate), exp2((z_q[i] - max_q) * rate));
  });
}

template <class A>
void kl_grad_p_piece(const A* z_p, const A* z_q, int64_t n, A max_p, A max_q, A rate, KlGrad<A> g, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c_p = z_p[i] - max_p, c_q = z_q[i] - max_q;
    out[i] = kl_grad_p(g, exp2(c_p * rate), c_p - c_q);
  });
}

// The gradient of one side, whose share of the mixture is `share`.
template <class A>
void mixture_grad_piece(const A* z_own, const A* z_other, int64_t n, LogSoftmax<A> own, LogSoftmax<A> other, A share,
                        A of_other, A kl, A scale, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const Mixture<A> m = mixture(own(z_own[i]), other(z_other[i]), share, of_other);
    out[i] = mixture_grad(m.p, m.p_ratio, kl, scale * share);
  });
}

// coef * exp((z - max) / T)
template <class A>
void exp_grad_piece(const A* z, int64_t n, A max, A rate, A coef, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED { out[i] = coef * exp2((z[i] - max) * rate); });
}

// coef * exp(z - max) - uniform
template <class A>
void ce_grad_piece(const A* z, int64_t n, A max, A coef, A uniform, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED { out[i] = coef * exp2((z[i] - max) * A(kLog2E)) - uniform; });
}

// The same, and the gradient of the KL.
template <int kT, class A>
void kl_ce_grad_piece(const A* z_p, const A* z_q, int64_t n, A max_p, A max_q, A rate, KlGrad<A> g, A coef, A uniform,
                      A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c_q = z_q[i] - max_q, e_q = exp2(c_q * rate);
    out[i] = kl_grad_q(g, exp2((z_p[i] - max_p) * rate), e_q) + (coef * exp_1<kT>(e_q, c_q) - uniform);
  });
}

template <class A>
void subtract_targets(const A* target, int64_t n, A coef, A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED { return old - coef * target[i]; });
}

// ---- rows

template <class A>
using State = KlState<A, double>;

// Accumulates sums(p, q, n, max_p, max_q, rate) of a piece: `unmasked` unless a logit is masked, then `masked`. -> the
// piece's sum q_1.
template <class A, class F>
A kl_update(State<A>& s, const A* p, const A* q, int64_t n, A rate, const F& unmasked, const F& masked) {
  const A top_p = max_of(p, n, s.max_p), top_q = max_of(q, n, s.max_q);
  if (top_p > s.max_p || top_q > s.max_q) s.rebase(top_p, top_q, rate);
  const A max_p = finite_max(s.max_p), max_q = finite_max(s.max_q);
  KlSums<A> piece = unmasked(p, q, n, max_p, max_q, rate);
  if (!(piece.dot - piece.dot == 0)) piece = masked(p, q, n, max_p, max_q, rate);
  s.sum_p += piece.p;
  s.sum_q += piece.q;
  s.dot += piece.dot;
  return piece.q_1;
}

template <class A>
State<A> kl_sweep(const Row<A>& p, const Row<A>& q, int64_t cols, int64_t skipped, A rate) {
  State<A> s;
  for_row_pieces(cols, skipped, [&](int64_t begin, int64_t n) {
    kl_update(s, p.piece(begin, n), q.piece(begin, n), n, rate, kl_sums<false, A>, kl_sums<true, A>);
  });
  return s;
}

// KL(p || q) of a row whose sums are complete.
template <class A>
A row_kl(const State<A>& s, const Row<A>& p, const Row<A>& q, int64_t cols, int64_t skipped, A rate) {
  double kl = s.kl(rate);
  if (!(kl < kNear) || s.sum_p == 0) return static_cast<A>(kl);
  const NearRow<A> near = near_row(s, rate);
  kl = 0;
  for_row_pieces(cols, skipped,
                 [&](int64_t begin, int64_t n) { kl += near_sum(p.piece(begin, n), q.piece(begin, n), n, near); });
  return static_cast<A>(kl);
}

// ---- softmax_kl: p is the side whose probabilities weigh

// One row's KL(q || m) and KL(p || m) into its statistics, for 0 < beta < 1.
template <class A>
void mixture_row(const Row<A>& s, const Row<A>& t, int64_t cols, A rate, const Shares<A>& shares, Stats<A> stats) {
  alignas(64) A e_s[kChunk], e_t[kChunk];
  const Softmax<A> side_s = softmax_sweep<true>(s, cols, -1, rate, e_s),
                   side_t = softmax_sweep<true>(t, cols, -1, rate, e_t);
  const LogSoftmax<A> log_s(side_s, rate), log_t(side_t, rate);
  double kl_s = 0, kl_t = 0;
  for_pieces(0, cols, [&](int64_t begin, int64_t n) {
    const A *z_s = s.piece(begin, n), *z_t = t.piece(begin, n);
    if (cols > kChunk) {
      write_exponentials(z_s, n, side_s.max, rate, e_s);
      write_exponentials(z_t, n, side_t.max, rate, e_t);
    }
    const MixtureSums<A> sums = mixture_sums(z_t, z_s, e_t, e_s, n, log_t, log_s, shares.p, shares.q);
    kl_t += kLn2 * sums.p;
    kl_s += kLn2 * sums.q;
  });
  const bool both = side_s.sum > 0 && side_t.sum > 0;  // an empty row leaves the mixture with less than the mass of 1
  if (both && (kl_s < kNear || kl_t < kNear)) {        // next to 0 and 1 a mixture is near one of them
    double near_s = 0, near_t = 0;
    for_pieces(0, cols, [&](int64_t begin, int64_t n) {
      const MixtureSums<A> sums =
          near_mixture_sums(t.piece(begin, n), s.piece(begin, n), n, log_t, log_s, shares.p, shares.q);
      near_t += sums.p;
      near_s += sums.q;
    });
    if (kl_s < kNear) kl_s = near_s;
    if (kl_t < kNear) kl_t = near_t;
  }
  stats.set_softmax(kStudent, s.row, side_s);
  stats.set_softmax(kTeacher, s.row, side_t);
  stats[kStudent + kKl][s.row] = static_cast<A>(kl_s);
  stats[kTeacher + kKl][s.row] = static_cast<A>(kl_t);
}

// One row's KL(p || q), or KL(q || p) if `reverse`.
template <class A>
void kl_row(const Row<A>& s, const Row<A>& t, int64_t cols, A rate, bool reverse, Stats<A> stats) {
  const Row<A>&p = reverse ? s : t, &q = reverse ? t : s;
  const State<A> state = kl_sweep(p, q, cols, -1, rate);
  const A kl = row_kl(state, p, q, cols, -1, rate);
  stats.set_softmax(kStudent, s.row, reverse ? state.p() : state.q());
  stats.set_softmax(kTeacher, s.row, reverse ? state.q() : state.p());
  stats[kStudent + kKl][s.row] = reverse ? kl : A(0);
  stats[kTeacher + kKl][s.row] = reverse ? A(0) : kl;
}

template <class A>
void softmax_kl_rows(const Inputs<A>& in, const Shares<A>& shares) {
  for_rows(in.rows, in.cols, [&](int64_t row) {
    if (in.is_masked(row)) return in.stats.clear(kKlStats, row);
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    const A rate = in.temperature.rate(row);
    if (shares.mixed) {
      mixture_row(s, t, in.cols, rate, shares, in.stats);
    } else {
      kl_row(s, t, in.cols, rate, shares.reverse, in.stats);
    }
  });
}

template <class A>
void write_kl_grads(const Row<A>& p, const Row<A>& q, int64_t cols, int64_t skipped, A rate, A max_p, A max_q,
                    const KlGrad<A>& g, const Matrix& out_p, const Matrix& out_q) {
  alignas(64) A buffer[kChunk];
  for_row_pieces(cols, skipped, [&](int64_t begin, int64_t n) {
    const A *z_p = p.piece(begin, n), *z_q = q.piece(begin, n);
    if (out_q.data) {
      A* out = target(out_q, q.row, begin, buffer);
      kl_grad_q_piece(z_p, z_q, n, max_p, max_q, rate, g, out);
      write(out_q, q.row, begin, n, out);
    }
    if (out_p.data) {
      A* out = target(out_p, p.row, begin, buffer);
      kl_grad_p_piece(z_p, z_q, n, max_p, max_q, rate, g, out);
      write(out_p, p.row, begin, n, out);
    }
  });
}

template <class A>
void write_mixture_grad(const Row<A>& own, const Row<A>& other, int64_t cols, A rate, A share, A of_other,
                        Softmax<A> side_own, Softmax<A> side_other, A kl, A scale, const Matrix& to) {
  alignas(64) A buffer[kChunk];
  const LogSoftmax<A> log_own(side_own, rate), log_other(side_other, rate);
  for_pieces(0, cols, [&](int64_t begin, int64_t n) {
    A* out = target(to, own.row, begin, buffer);
    mixture_grad_piece(own.piece(begin, n), other.piece(begin, n), n, log_own, log_other, share, of_other, kl, scale,
                       out);
    write(to, own.row, begin, n, out);
  });
}

template <class A>
void softmax_kl_grad_rows(const Inputs<A>& in, const Shares<A>& shares, A scale, const Gradients& to) {
  const Stats<A>& stats = in.stats;
  const int64_t cols = in.cols;
  for_rows(in.rows, cols, [&](int64_t row) {
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    const Softmax<A> side_s = stats.softmax(kStudent, row), side_t = stats.softmax(kTeacher, row);
    const A kl_s = stats[kStudent + kKl][row], kl_t = stats[kTeacher + kKl][row];
    const A factor = to.of_row(in, row, scale * in.temperature[row]);
    const A rate = in.temperature.rate(row);
    if (factor == 0) {
      write_zeros<A>(to.student, row, cols);
      write_zeros<A>(to.teacher, row, cols);
    } else if (!shares.mixed && !shares.reverse) {
      write_kl_grads(t, s, cols, -1, rate, side_t.max, side_s.max, kl_grad(side_t, side_s, kl_t, factor, rate),
                     to.teacher, to.student);
    } else if (shares.reverse) {
      write_kl_grads(s, t, cols, -1, rate, side_s.max, side_t.max, kl_grad(side_s, side_t, kl_s, factor, rate),
                     to.student, to.teacher);
    } else {
      const A bits = A(kLn2) * factor;
      if (to.student.data) {
        write_mixture_grad(s, t, cols, rate, shares.q, shares.p, side_s, side_t, A(kLog2E) * kl_s, bits, to.student);
      }
      if (to.teacher.data) {
        write_mixture_grad(t, s, cols, rate, shares.p, shares.q, side_t, side_s, A(kLog2E) * kl_t, bits, to.teacher);
      }
    }
  });
}

// ---- softmax_kl_topk

void check_indices(const TopK& teacher, int64_t rows, int64_t cols) {
  std::atomic<int64_t> first{rows * teacher.count};  // of the indices that cannot be used
  for_ranges(rows, row_grain(teacher.count), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> seen(cols);
    for (int64_t row = begin; row < end; ++row) {
      int64_t good = 0;
      for (; good < teacher.count; ++good) {
        const int64_t index = teacher.at(row, good);
        if (index < 0 || index >= cols || seen[index]) break;
        seen[index] = 1;
      }
      for (int64_t i = 0; i < good; ++i) seen[teacher.at(row, i)] = 0;
      if (good == teacher.count) continue;
      const int64_t here = row * teacher.count + good;
      for (int64_t other = first; here < other && !first.compare_exchange_weak(other, here);) {
      }
      break;
    }
  });
  if (first == rows * teacher.count) return;
  const int64_t row = first / teacher.count, i = first % teacher.count, index = teacher.at(row, i);
  const bool twice = index >= 0 && index < cols;
  throw std::invalid_argument("teacher.indices[" + std::to_string(row) + ", " + std::to_string(i) + "] is " +
                              std::to_string(index) +
                              (twice ? ", which the row has already: expected each class at most once"
                                     : ", expected a class from 0 to " + std::to_string(cols - 1)));
}

// The kept classes of a row, chained by the chunk of columns that they are in: the indices of a row have no order.
template <class A>
class Kept {
 public:
  Kept(const TopK& teacher, int64_t cols)
      : teacher_(teacher),
        cols_(cols),
        first_((cols + kChunk - 1) / kChunk),
        next_(teacher.count),
        p_(teacher.count),
        q_(teacher.count) {}

  void set_row(int64_t row) {
    row_ = row;
    rest = teacher_.rest.data ? read<A>(teacher_.rest, row) : -infinity<A>();
    values = read<A>(teacher_.values, row, 0, teacher_.count, p_.data());
    std::fill(first_.begin(), first_.end(), -1);
    for (int64_t i = 0; i < teacher_.count; ++i) {
      const int64_t index = teacher_.at(row, i);
      if (index < 0 || index >= cols_) continue;  // a backward that was given other indices than its forward
      next_[i] = first_[index / kChunk];
      first_[index / kChunk] = i;
    }
  }

  // f(i, at) for the kept classes in a piece: the i-th, which is element `at` of the piece.
  template <class F>
  void for_piece(int64_t begin, int64_t n, const F& f) const {
    for (int64_t i = first_[begin / kChunk]; i >= 0; i = next_[i]) {
      const int64_t at = teacher_.at(row_, i) - begin;
      if (at >= 0 && at < n) f(i, at);
    }
  }

  // The piece with the kept classes masked; copies their logits.
  const A* mask(const A* z, int64_t begin, int64_t n, A* buffer) {
    if (first_[begin / kChunk] < 0) return z;
    if (z != buffer) std::copy(z, z + n, buffer);
    for_piece(begin, n, [&](int64_t i, int64_t at) {
      q_[i] = buffer[at];
      buffer[at] = -infinity<A>();
    });
    return buffer;
  }

  const A* logits() const { return q_.data(); }  // of the student

  A rest;           // the teacher's logit of all other classes
  const A* values;  // the teacher's logits

 private:
  const TopK& teacher_;
  int64_t cols_, row_ = 0;
  std::vector<int64_t> first_, next_;  // of each chunk; after each index; -1: none
  std::vector<A> p_, q_;
};

// The student's softmax over the classes that are not kept.
template <class A>
Softmax<A> rest_sweep(const Row<A>& s, int64_t cols, A rate, Kept<A>& kept) {
  A max = -infinity<A>();
  double sum = 0;
  for_pieces(0, cols, [&](int64_t begin, int64_t n) {
    const A* z = kept.mask(s.piece(begin, n), begin, n, s.buffer);
    const A top = max_of(z, n, max);
    if (top > max) sum *= exp2((double(max) - top) * rate);
    max = top;
    sum += exponential_sum<false, A>(z, n, finite_max(max), rate, nullptr);
  });
  return {finite_max(max), static_cast<A>(sum)};
}

template <class A>
void softmax_kl_topk_rows(const Inputs<A>& in, const TopK& teacher) {
  const int64_t cols = in.cols;
  for_ranges(in.rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    alignas(64) A buffer[kChunk];
    Kept<A> kept(teacher, cols);
    for (int64_t row = begin; row < end; ++row) {
      if (in.is_masked(row)) {
        in.stats.clear(kTopKStats, row);
        continue;
      }
      kept.set_row(row);
      const A rate = in.temperature.rate(row);
      const Softmax<A> rest = rest_sweep(Row<A>{in.student, row, buffer}, cols, rate, kept);
      State<A> state;
      state.max_p = max_of(kept.values, teacher.count, kept.rest);
      state.max_q = max_of(kept.logits(), teacher.count, rest.sum == 0 ? -infinity<A>() : rest.max);
      for_pieces(0, teacher.count, [&](int64_t at, int64_t n) {
        kl_update(state, kept.values + at, kept.logits() + at, n, rate, kl_sums<false, A>, kl_sums<true, A>);
      });
      add_rest(state, kept.rest, rest, rate);
      double kl = state.kl(rate);
      if (kl < kNear && state.sum_p > 0) {
        const NearRow<A> near = near_row(state, rate);
        kl = near_rest_term(near, kept.rest, rest);
        for_pieces(0, teacher.count,
                   [&](int64_t at, int64_t n) { kl += near_sum(kept.values + at, kept.logits() + at, n, near); });
      }
      in.stats.set_softmax(kStudent, row, state.q());
      in.stats[kStudent + kKl][row] = 0;
      in.stats.set_softmax(kTeacher, row, state.p());
      in.stats[kTeacher + kKl][row] = static_cast<A>(kl);
      in.stats.set_softmax(kTopKRest, row, rest);
    }
  });
}

template <class A>
void softmax_kl_topk_grad_rows(const Inputs<A>& in, const TopK& teacher, A scale, const Gradients& to) {
  const Stats<A>& stats = in.stats;
  const int64_t cols = in.cols;
  for_ranges(in.rows, row_grain(cols), [&](int64_t first, int64_t last) {
    alignas(64) A student_buffer[kChunk], buffer[kChunk];
    Kept<A> kept(teacher, cols);
    for (int64_t row = first; row < last; ++row) {
      kept.set_row(row);
      const Row<A> s{in.student, row, student_buffer};
      const Softmax<A> p = stats.softmax(kTeacher, row), q = stats.softmax(kStudent, row),
                       rest = stats.softmax(kTopKRest, row);
      const A factor = to.of_row(in, row, scale * in.temperature[row]);
      if (factor == 0) {
        write_zeros<A>(to.student, row, cols);
        continue;
      }
      const A rate = in.temperature.rate(row);
      const KlGrad<A> g = kl_grad(p, q, stats[kTeacher + kKl][row], factor, rate);
      const A coef = rest_grad(g, kept.rest, p, q, rest, rate);
      for_pieces(0, cols, [&](int64_t begin, int64_t n) {
        const A* z = s.piece(begin, n);
        A* out = target(to.student, row, begin, buffer);
        exp_grad_piece(z, n, rest.max, rate, coef, out);
        // Whatever that made of the kept classes, which may be larger than any of the rest.
        kept.for_piece(begin, n, [&](int64_t i, int64_t at) {
          out[at] = kl_grad_q(g, exp2((kept.values[i] - p.max) * rate), exp2((z[at] - q.max) * rate));
        });
        write(to.student, row, begin, n, out);
      });
    }
  });
}

// ---- cross_entropy_kl

// Probabilities of a target do not sum to less than 0: logits and their logarithms do.
template <class A>
void check_masses(const Inputs<A>& in, A smoothing) {
  for (int64_t row = 0; row < in.rows; ++row) {
    if (in.is_masked(row)) continue;
    const double mass = (in.stats[kMass][row] - smoothing) / (smoothing < 1 ? 1 - smoothing : A(1));
    if (!(mass < kMinMass)) continue;
    char number[32];
    std::snprintf(number, sizeof(number), "%.6g", mass);
    throw std::invalid_argument("labels[" + std::to_string(row) + "] are probabilities that sum to " + number +
                                ", expected 0 or more: pass probabilities, not logits or log-probabilities");
  }
}

// -> the cross-entropy of each row; 0 where its label is ignored.
template <class A>
void cross_entropy_kl_rows(const Inputs<A>& in, const Labels& labels, int64_t ignore_index, A smoothing, A* ce_rows) {
  const Stats<A>& stats = in.stats;
  const int64_t cols = in.cols;
  for_rows(in.rows, cols, [&](int64_t row) {
    const bool kept = !labels.index || labels.at(row) != ignore_index;
    if (in.is_masked(row) || (!kept && !in.teacher.data)) {
      ce_rows[row] = 0;
      return stats.clear(kCeStats, row);
    }
    const A rate = in.temperature.rate(row);
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    State<A> state;
    CeState<double> ce;
    for_pieces(0, cols, [&](int64_t begin, int64_t n) {
      const A* z = s.piece(begin, n);
      const A before = state.max_q;
      A sum_1 = 0;
      if (in.teacher.data) {
        sum_1 = dispatch_temperature<1, 2, 4>(rate, [&](auto t_1) {
          return kl_update(state, t.piece(begin, n), z, n, rate, kl_ce_sums<t_1.value, false, A>,
                           kl_ce_sums<t_1.value, true, A>);
        });
      } else {
        state.max_q = max_of(z, n, state.max_q);
        sum_1 = exponential_sum<false, A>(z, n, state.q().max, A(kLog2E), nullptr);
      }
      const A max = state.q().max;
      ce.rebase(double(before) - double(state.max_q), before == -infinity<A>());
      ce.sum_1 += sum_1;
      if (smoothing != 0) ce.centred += centred_sum(z, n, max);
      if (!labels.index) {
        const A* target = read<A>(labels.probabilities, row, begin, n, teacher_buffer);
        const TargetSums<A> sums = target_sums(z, target, n, max);
        ce.target_dot += sums.dot;
        ce.target_mass += sums.mass;
      }
      ce.seen += n;
    });
    if (labels.index && kept) {
      ce.target_dot = s.at(labels.at(row)) - state.q().max;
      ce.target_mass = 1;
    }
    ce_rows[row] =
        kept ? cross_entropy<double>(ce.sum_1, ce.centred, ce.target_dot, ce.target_mass, smoothing, cols) : 0;
    stats.set_softmax(kStudent, row, state.q());
    stats[kSum1][row] = static_cast<A>(ce.sum_1);
    stats[kCeWeight][row] = kept ? in.ce_weight_of(row) : A(0);
    stats[kMass][row] = (1 - smoothing) * static_cast<A>(ce.target_mass) + smoothing;
    stats.set_softmax(kCeTeacher, row, state.p());
    stats[kCeKl][row] = in.teacher.data ? row_kl(state, t, s, cols, -1, rate) : A(0);
  });
}

template <class A>
void cross_entropy_kl_grad_rows(const Inputs<A>& in, const Labels& labels, A kl_scale, A smoothing,
                                const Gradients& to) {
  const Stats<A>& stats = in.stats;
  const int64_t cols = in.cols;
  for_rows(in.rows, cols, [&](int64_t row) {
    const A rate = in.temperature.rate(row);
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk], buffer[kChunk];
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    const Softmax<A> side_s = stats.softmax(kStudent, row), side_t = stats.softmax(kCeTeacher, row);
    const CeGrad<A> g = ce_grad(stats, row, cols, rate, read<A>(to.upstream, row),
                                kl_scale * in.temperature[row] * in.weight_of(row), smoothing);
    if (!g.has_kl) write_zeros<A>(to.teacher, row, cols);
    if (!g.has_kl && !g.has_ce) return write_zeros<A>(to.student, row, cols);
    for_pieces(0, cols, [&](int64_t begin, int64_t n) {
      const A* z = s.piece(begin, n);
      const A* z_t = in.teacher.data && g.has_kl ? t.piece(begin, n) : nullptr;
      if (to.student.data) {
        A* out = target(to.student, row, begin, buffer);
        if (z_t && !g.has_ce) {
          kl_grad_q_piece(z_t, z, n, side_t.max, side_s.max, rate, g.kl, out);
        } else if (z_t) {
          dispatch_temperature<1, 2, 4>(rate, [&](auto t_1) {
            kl_ce_grad_piece<t_1.value>(z_t, z, n, side_t.max, side_s.max, rate, g.kl, g.coef, g.uniform, out);
          });
        } else {
          ce_grad_piece(z, n, side_s.max, g.coef, g.uniform, out);
        }
        if (labels.index) {
          const int64_t at = labels.at(row) - begin;
          if (g.has_ce && at >= 0 && at < n) out[at] -= g.target;
        } else if (g.has_ce) {
          alignas(64) A target_buffer[kChunk];
          subtract_targets(read<A>(labels.probabilities, row, begin, n, target_buffer), n, g.target, out);
        }
        write(to.student, row, begin, n, out);
      }
      if (to.teacher.data && z_t) {
        A* out = target(to.teacher, row, begin, buffer);
        kl_grad_p_piece(z_t, z, n, side_t.max, side_s.max, rate, g.kl, out);
        write(to.teacher, row, begin, n, out);
      }
    });
  });
}

// ---- dkd

template <class A>
void dkd_rows(const Inputs<A>& in, const Labels& labels) {
  const Stats<A>& stats = in.stats;
  const int64_t cols = in.cols;
  for_rows(in.rows, cols, [&](int64_t row) {
    if (in.is_masked(row)) return stats.clear(kDkdStats, row);
    const A rate = in.temperature.rate(row);
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
    const int64_t label = labels.at(row);
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    const State<A> state = kl_sweep(t, s, cols, label, rate);
    const A odds_s = log_odds(s.at(label), state.q(), rate), odds_t = log_odds(t.at(label), state.p(), rate);
    stats.set_softmax(kStudent, row, state.q());
    stats[kStudent + kOdds][row] = odds_s;
    stats.set_softmax(kTeacher, row, state.p());
    stats[kTeacher + kOdds][row] = odds_t;
    stats[kRestKl][row] = row_kl(state, t, s, cols, label, rate);
    stats[kTargetKl][row] = target_kl(odds_t, odds_s, near_row(state, rate).log_ratio(t.at(label), s.at(label)));
  });
}

template <class A>
void dkd_grad_rows(const Inputs<A>& in, const Labels& labels, A alpha, A beta, A scale, const Gradients& to) {
  const Stats<A>& stats = in.stats;
  const int64_t cols = in.cols;
  for_rows(in.rows, cols, [&](int64_t row) {
    const A rate = in.temperature.rate(row);
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
    const int64_t label = labels.at(row);
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    const Softmax<A> side_s = stats.softmax(kStudent, row), side_t = stats.softmax(kTeacher, row);
    const DkdGrad<A> g = dkd_grad(stats, row, rate, alpha, beta, to.of_row(in, row, scale * in.temperature[row]));
    if (!g.has_rest) {
      write_zeros<A>(to.student, row, cols);
      return write_zeros<A>(to.teacher, row, cols);
    }
    write_kl_grads(t, s, cols, label, rate, side_t.max, side_s.max, g.rest, to.teacher, to.student);
    if (to.student.data) write_one(to.student, row, label, g.student);
    if (to.teacher.data) write_one(to.teacher, row, label, g.teacher);
  });
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void softmax_kl(const Inputs<A>& in, const Shares<A>& shares) const {
    softmax_kl_rows(in, shares);
  }

  template <class A>
  void softmax_kl_backward(const Inputs<A>& in, const Shares<A>& shares, A scale, const Gradients& to) const {
    softmax_kl_grad_rows(in, shares, scale, to);
  }

  template <class A>
  void softmax_kl_topk(const Inputs<A>& in, const TopK& teacher) const {
    check_indices(teacher, in.rows, in.cols);
    softmax_kl_topk_rows(in, teacher);
  }

  template <class A>
  void softmax_kl_topk_backward(const Inputs<A>& in, const TopK& teacher, A scale, const Gradients& to) const {
    softmax_kl_topk_grad_rows(in, teacher, scale, to);
  }

  template <class A>
  void cross_entropy_kl(const Inputs<A>& in, const Labels& labels, int64_t ignore_index, A smoothing, A* ce) const {
    check_labels(labels, in.rows, in.cols, &ignore_index);
    cross_entropy_kl_rows(in, labels, ignore_index, smoothing, ce);
    if (!labels.index) check_masses(in, smoothing);
  }

  template <class A>
  void cross_entropy_kl_backward(const Inputs<A>& in, const Labels& labels, A kl_scale, A smoothing,
                                 const Gradients& to) const {
    cross_entropy_kl_grad_rows(in, labels, kl_scale, smoothing, to);
  }

  template <class A>
  void dkd(const Inputs<A>& in, const Labels& labels) const {
    check_labels(labels, in.rows, in.cols);
    dkd_rows(in, labels);
  }

  template <class A>
  void dkd_backward(const Inputs<A>& in, const Labels& labels, A alpha, A beta, A scale, const Gradients& to) const {
    dkd_grad_rows(in, labels, alpha, beta, scale, to);
  }

  // The loss: the sum of the values, or each of them.
  template <class A, class Value>
  void reduce(const Value& value, int64_t rows, bool sum, const Tensor&, A* out) const {
    reduce_rows(rows, sum, out, value);
  }
};

}  // namespace
}  // namespace softmax_kl
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::softmax_kl::register_ops<kdfast::softmax_kl::Cpu>(m); }
