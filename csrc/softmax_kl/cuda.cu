#include "common/rows.cuh"
#include "common/sum.cuh"
#include "softmax_kl/host.h"
#include "softmax_kl/sweep.cuh"

namespace kdfast {
namespace softmax_kl {
namespace {

template <class A>
__device__ void skip(int64_t at, A (&z)[kStep]) {
  if (at < 0 || at >= kStep) return;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    if (i == at) z[i] = -infinity<A>();
  }
}

// Reads a step of two rows, with the class `skipped` masked.
template <class A>
__device__ void read_skipping(const Matrix& p, const Matrix& q, int64_t row, int64_t col, int64_t cols, int64_t skipped,
                              A (&z_p)[kStep], A (&z_q)[kStep]) {
  read(p, q, row, col, cols, -infinity<A>(), z_p, z_q);
  skip(skipped - col, z_p);
  skip(skipped - col, z_q);
}

// Whether a row is masked; then its statistics are written.
template <int kThreads, class A>
__device__ bool skips(const Inputs<A>& in, int64_t row, int64_t stats) {
  if (!in.is_masked(row)) return false;
  if (is_leader<kThreads>()) in.stats.clear(stats, row);
  return true;
}

// ---- forward sweeps
template <class A>
using State = KlState<A, A>;

template <int kThreads, class A>
__device__ void merge(State<A>& s, A rate) {
  s.rebase(group_reduce<kThreads>(s.max_p, Max{}), group_reduce<kThreads>(s.max_q, Max{}), rate);
  s.sum_p = group_reduce<kThreads>(s.sum_p, Add{});
  s.sum_q = group_reduce<kThreads>(s.sum_q, Add{});
  s.dot = group_reduce<kThreads>(s.dot, Add{});
}

template <int kThreads, class A>
__device__ State<A> kl_sweep(const Matrix& p, const Matrix& q, int64_t row, int64_t cols, int64_t skipped, A rate) {
  State<A> s;
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A z_p[kStep], z_q[kStep];
    read_skipping(p, q, row, col, cols, skipped, z_p, z_q);
    kl_update(s, z_p, z_q, rate);
  });
  merge<kThreads>(s, rate);
  return s;
}

// KL(p || q) of a row whose sums are complete; every thread gets it.
template <int kThreads, class A>
__device__ A row_kl(const State<A>& s, const Matrix& p, const Matrix& q, int64_t row, int64_t cols, int64_t skipped,
                    A rate) {
  const A kl = s.kl(rate);
  if (!(kl < A(kNear)) || s.sum_p == 0) return kl;
  const NearRow<A> near = near_row(s, rate);
  A sum = 0;
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A z_p[kStep], z_q[kStep];
    read_skipping(p, q, row, col, cols, skipped, z_p, z_q);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += near.term(z_p[i], z_q[i]);
  });
  return group_reduce<kThreads>(sum, Add{});
}

// KL(q || m) and KL(p || m) of a row where all are near.
template <int kThreads, class A>
__device__ void near_mixture_row(const Matrix& student, const Matrix& teacher, int64_t row, int64_t cols,
                                 const LogSoftmax<A>& log_s, const LogSoftmax<A>& log_t, const Shares<A>& shares,
                                 A& kl_s, A& kl_t) {
  const A log2_ratio = log_t.log2_sum - log_s.log2_sum;
  kl_s = kl_t = 0;
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A z_s[kStep], z_t[kStep];
    read(student, teacher, row, col, cols, -infinity<A>(), z_s, z_t);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const Mixture<A> m = mixture(log_t(z_t[i]), log_s(z_s[i]), shares.p, shares.q);
      const A d = A(kLn2) * (centred_gap(z_t[i], z_s[i], log_t.max, log_s.max) * log_s.rate - log2_ratio);
      const NearMixture<A> near = near_mixture(m, d, shares.p, shares.q);
      kl_t += near.p;
      kl_s += near.q;
    }
  });
  kl_t = group_reduce<kThreads>(kl_t, Add{});
  kl_s = group_reduce<kThreads>(kl_s, Add{});
}

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>()) softmax_kl_forward_kernel(Inputs<A> in, Shares<A> shares) {
  const int64_t row = group_index<kThreads>(), cols = in.cols;
  if (row >= in.rows || skips<kThreads>(in, row, kKlStats)) return;
  const Matrix &student = in.student, &teacher = in.teacher;
  const Stats<A>& stats = in.stats;
  const A rate = in.temperature.rate(row);
  const Matrix p = choose(shares.reverse, student, teacher), q = choose(shares.reverse, teacher, student);
  const State<A> s = kl_sweep<kThreads>(p, q, row, cols, -1, rate);
  const Softmax<A> side_s = shares.reverse ? s.p() : s.q(), side_t = shares.reverse ? s.q() : s.p();
  A kl_s = 0, kl_t = 0;
  if (!shares.mixed) {
    (shares.reverse ? kl_s : kl_t) = row_kl<kThreads>(s, p, q, row, cols, -1, rate);
  } else {
    const LogSoftmax<A> log_s(side_s, rate), log_t(side_t, rate);
    for_steps<kThreads>(0, cols, [&](int64_t col) {
      A z_s[kStep], z_t[kStep];
      read(student, teacher, row, col, cols, -infinity<A>(), z_s, z_t);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const Mixture<A> m = mixture(log_t(z_t[i]), log_s(z_s[i]), shares.p, shares.q);
        kl_t += mixture_term(m.p, m.p_ratio);
        kl_s += mixture_term(m.q, m.q_ratio);
      }
    });
    kl_t = A(kLn2) * group_reduce<kThreads>(kl_t, Add{});
    kl_s = A(kLn2) * group_reduce<kThreads>(kl_s, Add{});
    const bool both = side_s.sum > 0 && side_t.sum > 0;  // an empty row leaves the mixture with less than the mass of 1
    if (both && (kl_s < A(kNear) || kl_t < A(kNear))) {  // next to 0 and 1 a mixture is near one of them
      A near_s = 0, near_t = 0;
      near_mixture_row<kThreads>(student, teacher, row, cols, log_s, log_t, shares, near_s, near_t);
      if (kl_s < A(kNear)) kl_s = near_s;
      if (kl_t < A(kNear)) kl_t = near_t;
    }
  }
  if (is_leader<kThreads>()) {
    stats.set_softmax(kStudent, row, side_s);
    stats.set_softmax(kTeacher, row, side_t);
    stats[kStudent + kKl][row] = kl_s;
    stats[kTeacher + kKl][row] = kl_t;
  }
}

// Columns whose bits fit into what KD_SHARED gives a group for the kept classes of a top-k teacher.
template <int kThreads>
constexpr int64_t kMarked = kThreads == kWarp ? kShortRow : kPiece;

static_assert(kBlock / kWarp * kShortRow <= kPiece, "one array serves eight warps or a block");

// One bit per column in [begin, end): whether the row keeps that class. -> whether this thread saw a class twice.
template <int kThreads>
__device__ bool mark(const TopK& teacher, int64_t row, int64_t begin, int64_t end, unsigned* bits) {
  const int lane = threadIdx.x % kThreads;
  group_sync<kThreads>();  // the bits of the columns before have been read
  for (int word = lane; word < kMarked<kThreads> / 32; word += kThreads) bits[word] = 0;
  group_sync<kThreads>();
  bool twice = false;
  for (int64_t i = lane; i < teacher.count; i += kThreads) {
    const int64_t index = teacher.at(row, i);
    if (index < begin || index >= end) continue;
    const unsigned bit = 1u << ((index - begin) % 32);
    twice |= (atomicOr(&bits[(index - begin) / 32], bit) & bit) != 0;
  }
  group_sync<kThreads>();
  return twice;
}

// The student's softmax over the classes that the teacher leaves out; every thread gets it. `wrong`: whether this
// thread saw a class twice.
template <int kThreads, class A>
__device__ Softmax<A> rest_softmax(const Inputs<A>& in, const TopK& teacher, int64_t row, unsigned* bits, int& wrong) {
  const A rate = in.temperature.rate(row);
  A max_r = -infinity<A>(), sum_r = 0;
  for (int64_t begin = 0; begin < in.cols; begin += kMarked<kThreads>) {
    const int64_t end = in.cols - begin < kMarked<kThreads> ? in.cols : begin + kMarked<kThreads>;
    wrong |= mark<kThreads>(teacher, row, begin, end, bits);
    for_steps<kThreads>(begin, end, [&](int64_t col) {
      A z[kStep];
      read(in.student, row, col, in.cols, -infinity<A>(), z);
      const unsigned kept = bits[(col - begin) / 32] >> ((col - begin) % 32);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (kept >> i & 1) z[i] = -infinity<A>();
      }
      const A top = max_of(z, max_r);
      if (top > max_r) sum_r *= exp2((max_r - top) * rate);
      max_r = top;
      const A max = finite_max(top);
#pragma unroll
      for (int i = 0; i < kStep; ++i) sum_r += exp2((z[i] - max) * rate);
    });
  }
  const A top_r = group_reduce<kThreads>(max_r, Max{});
  sum_r = group_reduce<kThreads>(is_masked(max_r) ? A(0) : sum_r * exp2((max_r - top_r) * rate), Add{});
  return {finite_max(top_r), sum_r};
}

// f(z_p, z_q) of the kept classes of this thread. -> whether an index is no class.
template <int kThreads, class A, class F>
__device__ bool for_kept(const Inputs<A>& in, const TopK& teacher, int64_t row, const F& f) {
  bool outside = false;
  for (int64_t i = threadIdx.x % kThreads; i < teacher.count; i += kThreads) {
    const int64_t index = teacher.at(row, i);
    if (index >= 0 && index < in.cols) {
      f(read_one<A>(teacher.values, row, i), read_one<A>(in.student, row, index));
    } else {
      outside = true;
    }
  }
  return outside;
}

// A row whose indices cannot be used has the KL NaN.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>()) softmax_kl_topk_forward_kernel(Inputs<A> in, TopK teacher) {
  KD_SHARED(unsigned, all_bits, kPiece / 32);
  const int64_t row = group_index<kThreads>();
  if (row >= in.rows || skips<kThreads>(in, row, kTopKStats)) return;
  const A rate = in.temperature.rate(row);
  int wrong = 0;
  unsigned* bits = all_bits + threadIdx.x / kThreads * (kMarked<kThreads> / 32);
  const Softmax<A> rest = rest_softmax<kThreads>(in, teacher, row, bits, wrong);
  const A rest_p = teacher.rest.data ? read<A>(teacher.rest, row) : -infinity<A>();

  // The kept classes, once more from the cache: maxima, then sums.
  State<A> s;
  s.max_p = rest_p;
  s.max_q = rest.sum == 0 ? -infinity<A>() : rest.max;
  wrong |= for_kept<kThreads>(in, teacher, row, [&](A z_p, A z_q) {
    s.max_p = max(s.max_p, z_p);
    s.max_q = max(s.max_q, z_q);
  });
  s.max_p = group_reduce<kThreads>(s.max_p, Max{});
  s.max_q = group_reduce<kThreads>(s.max_q, Max{});
  const A max_p = finite_max(s.max_p), max_q = finite_max(s.max_q);
  for_kept<kThreads>(in, teacher, row, [&](A z_p, A z_q) {
    const A c_p = z_p - max_p, c_q = z_q - max_q, e_p = exp2(c_p * rate);
    s.sum_p += e_p;
    s.sum_q += exp2(c_q * rate);
    s.dot += kl_term(e_p, c_p - c_q);
  });
  s.sum_p = group_reduce<kThreads>(s.sum_p, Add{});
  s.sum_q = group_reduce<kThreads>(s.sum_q, Add{});
  s.dot = group_reduce<kThreads>(s.dot, Add{});
  wrong = group_reduce<kThreads>(wrong, Max{});
  add_rest(s, rest_p, rest, rate);
  A kl = s.kl(rate);
  if (kl < A(kNear) && s.sum_p > 0) {
    const NearRow<A> near = near_row(s, rate);
    kl = 0;
    for_kept<kThreads>(in, teacher, row, [&](A z_p, A z_q) { kl += near.term(z_p, z_q); });
    kl = group_reduce<kThreads>(kl, Add{}) + near_rest_term(near, rest_p, rest);
  }
  if (!is_leader<kThreads>()) return;
  in.stats.set_softmax(kStudent, row, s.q());
  in.stats[kStudent + kKl][row] = 0;
  in.stats.set_softmax(kTeacher, row, s.p());
  in.stats[kTeacher + kKl][row] = wrong ? not_a_number<A>() : kl;
  in.stats.set_softmax(kTopKRest, row, rest);
}

// Cross-entropies go to `ce`; a label that is no class makes its row NaN.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    cross_entropy_kl_forward_kernel(Inputs<A> in, Labels labels, int64_t ignore_index, A smoothing, A* ce) {
  const int64_t row = group_index<kThreads>();
  if (row >= in.rows) return;
  if (skips<kThreads>(in, row, kCeStats)) {
    if (is_leader<kThreads>()) ce[row] = 0;
    return;
  }
  const A rate = in.temperature.rate(row);
  State<A> s;
  CeState<A> c;
  for_steps<kThreads>(0, in.cols, [&](int64_t col) {
    A z[kStep], other[kStep];
    read(in.student, row, col, in.cols, -infinity<A>(), z);
    const A before = s.max_q;
    if (in.teacher.data) {
      read(in.teacher, row, col, in.cols, -infinity<A>(), other);
      kl_update(s, other, z, rate);
    } else {
      s.max_q = max_of(z, s.max_q);
    }
    c.rebase(before - s.max_q, before == -infinity<A>());
    if (!labels.index) read(labels.probabilities, row, col, in.cols, A(0), other);
    const A top = finite_max(s.max_q);
    const int left = in.cols - col < kStep ? static_cast<int>(in.cols - col) : kStep;
    c.seen += static_cast<A>(left);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A centred = z[i] - top;  // -inf beyond the end, where targets are 0
      c.sum_1 += exp2(centred * A(kLog2E));
      c.centred += i < left ? centred : A(0);
    }
    if (labels.index) return;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      c.target_dot += target_term(other[i], z[i] - top);
      c.target_mass += other[i];
    }
  });
  const A before = s.max_q;
  if (in.teacher.data) {
    merge<kThreads>(s, rate);
  } else {
    s.max_q = group_reduce<kThreads>(s.max_q, Max{});
  }
  c.rebase(before - s.max_q, before == -infinity<A>());
  c.sum_1 = group_reduce<kThreads>(c.sum_1, Add{});
  c.centred = group_reduce<kThreads>(c.centred, Add{});
  c.target_dot = group_reduce<kThreads>(c.target_dot, Add{});
  c.target_mass = group_reduce<kThreads>(c.target_mass, Add{});
  const A kl = in.teacher.data ? row_kl<kThreads>(s, in.teacher, in.student, row, in.cols, -1, rate) : A(0);
  if (!is_leader<kThreads>()) return;
  A weight = 1;
  if (labels.index) {
    const int64_t label = labels.at(row);
    const bool valid = labels.is_class(row, in.cols);
    weight = label == ignore_index ? A(0) : valid ? A(1) : not_a_number<A>();
    c.target_dot = valid ? read_one<A>(in.student, row, label) - s.q().max : A(0);
    c.target_mass = 1;
  } else if (c.target_mass < A(kMinMass)) {
    weight = not_a_number<A>();
  }
  ce[row] = cross_entropy(c.sum_1, c.centred, c.target_dot, c.target_mass, smoothing, in.cols);
  in.stats.set_softmax(kStudent, row, s.q());
  in.stats[kSum1][row] = c.sum_1;
  in.stats[kCeWeight][row] = weight == 0 ? A(0) : weight * in.ce_weight_of(row);
  in.stats[kMass][row] = (1 - smoothing) * c.target_mass + smoothing;
  in.stats.set_softmax(kCeTeacher, row, s.p());
  in.stats[kCeKl][row] = kl;
}

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>()) dkd_forward_kernel(Inputs<A> in, Labels labels) {
  const int64_t row = group_index<kThreads>();
  if (row >= in.rows || skips<kThreads>(in, row, kDkdStats)) return;
  const A rate = in.temperature.rate(row);
  const int64_t label = labels.at(row);
  const State<A> s = kl_sweep<kThreads>(in.teacher, in.student, row, in.cols, label, rate);
  const A kl = row_kl<kThreads>(s, in.teacher, in.student, row, in.cols, label, rate);
  if (!is_leader<kThreads>()) return;
  const bool valid = labels.is_class(row, in.cols);
  const A z_s = valid ? read_one<A>(in.student, row, label) : not_a_number<A>();
  const A z_t = valid ? read_one<A>(in.teacher, row, label) : not_a_number<A>();
  const A odds_s = log_odds(z_s, s.q(), rate), odds_t = log_odds(z_t, s.p(), rate);
  in.stats.set_softmax(kStudent, row, s.q());
  in.stats[kStudent + kOdds][row] = valid ? odds_s : z_s;
  in.stats.set_softmax(kTeacher, row, s.p());
  in.stats[kTeacher + kOdds][row] = valid ? odds_t : z_t;
  in.stats[kRestKl][row] = kl;
  in.stats[kTargetKl][row] = valid ? target_kl(odds_t, odds_s, near_row(s, rate).log_ratio(z_t, z_s)) : z_t;
}

// ---- backward

// A gradient of zeros, where one is needed: that of a row without weight, whatever its logits are.
template <int kThreads, class A>
__device__ void write_zeros(const Matrix& to, const Part& at) {
  if (!to.data) return;
  const A zeros[kStep] = {};
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) { write(to, at.row, col, at.end, zeros); });
}

template <class A>
__device__ void kl_grad_step(const A (&z_p)[kStep], const A (&z_q)[kStep], A max_p, A max_q, A rate, const KlGrad<A>& g,
                             A (&to_p)[kStep], A (&to_q)[kStep]) {
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const A c_p = z_p[i] - max_p, c_q = z_q[i] - max_q;
    const A e_p = exp2(c_p * rate);
    to_q[i] = kl_grad_q(g, e_p, exp2(c_q * rate));
    to_p[i] = kl_grad_p(g, e_p, c_p - c_q);
  }
}

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    softmax_kl_backward_kernel(Inputs<A> in, Shares<A> shares, A scale, Gradients to) {
  const Part at = part<kThreads>(in.cols);
  const int64_t row = at.row;
  if (row >= in.rows) return;
  const Softmax<A> side_s = in.stats.softmax(kStudent, row), side_t = in.stats.softmax(kTeacher, row);
  const A kl_s = in.stats[kStudent + kKl][row], kl_t = in.stats[kTeacher + kKl][row];
  const A factor = to.of_row(in, row, scale * in.temperature[row]);
  if (factor == 0) {
    write_zeros<kThreads, A>(to.student, at);
    return write_zeros<kThreads, A>(to.teacher, at);
  }
  const A rate = in.temperature.rate(row);
  const KlGrad<A> g =
      shares.reverse ? kl_grad(side_s, side_t, kl_s, factor, rate) : kl_grad(side_t, side_s, kl_t, factor, rate);
  const LogSoftmax<A> log_s(side_s, rate), log_t(side_t, rate);
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A z_s[kStep], z_t[kStep], grad_s[kStep], grad_t[kStep];
    read(in.student, in.teacher, row, col, in.cols, A(0), z_s, z_t);
    if (shares.mixed) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const Mixture<A> m = mixture(log_t(z_t[i]), log_s(z_s[i]), shares.p, shares.q);
        grad_t[i] = mixture_grad(m.p, m.p_ratio, A(kLog2E) * kl_t, A(kLn2) * factor * shares.p);
        grad_s[i] = mixture_grad(m.q, m.q_ratio, A(kLog2E) * kl_s, A(kLn2) * factor * shares.q);
      }
    } else if (shares.reverse) {
      kl_grad_step(z_s, z_t, side_s.max, side_t.max, rate, g, grad_s, grad_t);
    } else {
      kl_grad_step(z_t, z_s, side_t.max, side_s.max, rate, g, grad_t, grad_s);
    }
    if (to.student.data) write(to.student, row, col, at.end, grad_s);
    if (to.teacher.data) write(to.teacher, row, col, at.end, grad_t);
  });
}

// First all classes of this part as if none was kept, then the kept ones. A row whose KL is NaN, because a class came
// twice or otherwise, is NaN from the first on.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    softmax_kl_topk_backward_kernel(Inputs<A> in, TopK teacher, A scale, Gradients to) {
  const Part at = part<kThreads>(in.cols);
  const int64_t row = at.row;
  if (row >= in.rows) return;
  const Softmax<A> p = in.stats.softmax(kTeacher, row), q = in.stats.softmax(kStudent, row),
                   rest = in.stats.softmax(kTopKRest, row);
  const A kl = in.stats[kTeacher + kKl][row];
  const A factor = to.of_row(in, row, scale * in.temperature[row]);
  if (factor == 0) return write_zeros<kThreads, A>(to.student, at);
  const A rate = in.temperature.rate(row);
  const KlGrad<A> g = kl_grad(p, q, kl, kl == kl ? factor : kl, rate);
  const A rest_p = teacher.rest.data ? read<A>(teacher.rest, row) : -infinity<A>();
  const A coef = rest_grad(g, rest_p, p, q, rest, rate);
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A z[kStep];
    read(in.student, row, col, in.cols, A(0), z);
#pragma unroll
    for (int i = 0; i < kStep; ++i) z[i] = coef * exp2((z[i] - rest.max) * rate);
    write(to.student, row, col, at.end, z);
  });
  if (kl != kl) return;
  group_sync<kThreads>();
  for (int64_t i = threadIdx.x % kThreads; i < teacher.count; i += kThreads) {
    const int64_t index = teacher.at(row, i);
    if (index < at.begin || index >= at.end) continue;
    const A e_p = exp2((read_one<A>(teacher.values, row, i) - p.max) * rate);
    write_one(to.student, row, index, kl_grad_q(g, e_p, exp2((read_one<A>(in.student, row, index) - q.max) * rate)));
  }
}

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    cross_entropy_kl_backward_kernel(Inputs<A> in, Labels labels, A kl_scale, A smoothing, Gradients to) {
  const Part at = part<kThreads>(in.cols);
  const int64_t row = at.row;
  if (row >= in.rows) return;
  const Softmax<A> side_s = in.stats.softmax(kStudent, row), side_t = in.stats.softmax(kCeTeacher, row);
  const A rate = in.temperature.rate(row);
  const CeGrad<A> g = ce_grad(in.stats, row, in.cols, rate, read<A>(to.upstream, row),
                              kl_scale * in.temperature[row] * in.weight_of(row), smoothing);
  if (!g.has_kl) write_zeros<kThreads, A>(to.teacher, at);
  if (!g.has_kl && !g.has_ce) return write_zeros<kThreads, A>(to.student, at);
  const int64_t label = labels.index ? labels.at(row) : -1;
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A z[kStep], other[kStep], grad_s[kStep] = {}, grad_t[kStep];
    read(in.student, row, col, in.cols, A(0), z);
    if (in.teacher.data && g.has_kl) {
      read(in.teacher, row, col, in.cols, A(0), other);
      kl_grad_step(other, z, side_t.max, side_s.max, rate, g.kl, grad_t, grad_s);
      if (to.teacher.data) write(to.teacher, row, col, at.end, grad_t);
    }
    if (!to.student.data) return;
    if (!g.has_ce) return write(to.student, row, col, at.end, grad_s);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      grad_s[i] += g.coef * exp2((z[i] - side_s.max) * A(kLog2E)) - g.uniform;
    }
    const int64_t here = label - col;
    if (!labels.index) {
      read(labels.probabilities, row, col, in.cols, A(0), other);
#pragma unroll
      for (int i = 0; i < kStep; ++i) grad_s[i] -= g.target * other[i];
    } else if (here >= 0 && here < kStep) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (i == here) grad_s[i] -= g.target;
      }
    }
    write(to.student, row, col, at.end, grad_s);
  });
}

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    dkd_backward_kernel(Inputs<A> in, Labels labels, A alpha, A beta, A scale, Gradients to) {
  const Part at = part<kThreads>(in.cols);
  const int64_t row = at.row;
  if (row >= in.rows) return;
  const int64_t label = labels.at(row);
  const A max_s = in.stats.softmax(kStudent, row).max, max_t = in.stats.softmax(kTeacher, row).max;
  const A rate = in.temperature.rate(row);
  const DkdGrad<A> g = dkd_grad(in.stats, row, rate, alpha, beta, to.of_row(in, row, scale * in.temperature[row]));
  if (!g.has_rest) {
    write_zeros<kThreads, A>(to.student, at);
    return write_zeros<kThreads, A>(to.teacher, at);
  }
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A z_s[kStep], z_t[kStep], grad_s[kStep], grad_t[kStep];
    read_skipping(in.student, in.teacher, row, col, in.cols, label, z_s, z_t);
    kl_grad_step(z_t, z_s, max_t, max_s, rate, g.rest, grad_t, grad_s);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (col + i != label) continue;
      grad_s[i] = g.student;
      grad_t[i] = g.teacher;
    }
    if (to.student.data) write(to.student, row, col, at.end, grad_s);
    if (to.teacher.data) write(to.teacher, row, col, at.end, grad_t);
  });
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void softmax_kl(const Inputs<A>& in, const Shares<A>& shares) const {
    launch_rows(device, softmax_kl_forward_kernel<A, kWarp>, softmax_kl_forward_kernel<A, kBlock>, in.rows, in.cols, 1,
                in, shares);
  }

  template <class A>
  void softmax_kl_backward(const Inputs<A>& in, const Shares<A>& shares, A scale, const Gradients& to) const {
    launch_rows(device, softmax_kl_backward_kernel<A, kWarp>, softmax_kl_backward_kernel<A, kBlock>, in.rows, in.cols,
                parts(in), in, shares, scale, to);
  }

  template <class A>
  void softmax_kl_topk(const Inputs<A>& in, const TopK& teacher) const {
    launch_rows(device, softmax_kl_topk_forward_kernel<A, kWarp>, softmax_kl_topk_forward_kernel<A, kBlock>, in.rows,
                in.cols, 1, in, teacher);
  }

  template <class A>
  void softmax_kl_topk_backward(const Inputs<A>& in, const TopK& teacher, A scale, const Gradients& to) const {
    launch_rows(device, softmax_kl_topk_backward_kernel<A, kWarp>, softmax_kl_topk_backward_kernel<A, kBlock>, in.rows,
                in.cols, parts(in), in, teacher, scale, to);
  }

  template <class A>
  void cross_entropy_kl(const Inputs<A>& in, const Labels& labels, int64_t ignore_index, A smoothing, A* ce) const {
    launch_rows(device, cross_entropy_kl_forward_kernel<A, kWarp>, cross_entropy_kl_forward_kernel<A, kBlock>, in.rows,
                in.cols, 1, in, labels, ignore_index, smoothing, ce);
  }

  template <class A>
  void cross_entropy_kl_backward(const Inputs<A>& in, const Labels& labels, A kl_scale, A smoothing,
                                 const Gradients& to) const {
    launch_rows(device, cross_entropy_kl_backward_kernel<A, kWarp>, cross_entropy_kl_backward_kernel<A, kBlock>,
                in.rows, in.cols, parts(in), in, labels, kl_scale, smoothing, to);
  }

  template <class A>
  void dkd(const Inputs<A>& in, const Labels& labels) const {
    launch_rows(device, dkd_forward_kernel<A, kWarp>, dkd_forward_kernel<A, kBlock>, in.rows, in.cols, 1, in, labels);
  }

  template <class A>
  void dkd_backward(const Inputs<A>& in, const Labels& labels, A alpha, A beta, A scale, const Gradients& to) const {
    launch_rows(device, dkd_backward_kernel<A, kWarp>, dkd_backward_kernel<A, kBlock>, in.rows, in.cols, parts(in), in,
                labels, alpha, beta, scale, to);
  }

  // The loss: the sum of the values, or each of them. Memory for partial sums is taken beside `like`.
  template <class A, class Value>
  void reduce(const Value& value, int64_t rows, bool sum, const Tensor& like, A* out) const {
    if (sum) return sum_of(device, like, value, rows, out);
    if (rows == 0) return;
    launch(device, {blocks_for(rows, kPerSum), kBlock}, sum_kernel<Value, A, A>, value, rows, out, nullptr);
  }

 private:
  template <class A>
  static int64_t parts(const Inputs<A>& in) {
    return blocks_for(in.cols, kPiece);
  }
};

}  // namespace
}  // namespace softmax_kl
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::softmax_kl::register_ops<kdfast::softmax_kl::Cuda>(m);
}
