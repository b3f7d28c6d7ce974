#include "common/rows.cuh"
#include "common/sum.cuh"
#include "ensemble/layout.h"

namespace kdfast {
namespace ensemble {
namespace {

constexpr int kAtOnce = 4;  // learners or weights that share a read of what they have in common

// ---- who works on what
template <int kThreads>
__device__ bool leads() {
  return threadIdx.x % kThreads == 0;
}

// The largest logit of a row, 0 where all are -inf.
template <int kThreads, class A>
__device__ A row_max(const Matrix& m, int64_t row, int64_t cols) {
  A top = -infinity<A>();
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A z[kStep];
    read(m, row, col, cols, -infinity<A>(), z);
    top = max_of(z, top);
  });
  return finite_max(group_reduce<kThreads>(top, Max{}));
}

// ---- mixed_logits_kl
template <class A>
struct Mixed {
  Networks networks;
  Mix mix;
  Labels labels;
  Column ramp;
  Temperature<A> temperature;
  int64_t rows, cols, learners, targets;
  A eps;
  double kl_scale, ce_scale;
  bool target_ce;
  MixedStats<A> stats;

  __device__ A rate() const { return temperature.rate(0); }

  __device__ int64_t target_of(int64_t learner) const { return targets == 1 ? 0 : learner; }
  // Of network m in target r.
  __device__ A weight(int64_t row, int64_t r, int64_t m) const {
    return mix.is_implied(r, m) ? static_cast<A>(mix.implied(m)) : read<A>(mix.column(row, r), m);
  }
  // Of the divergences, without T^2.
  __device__ A kl_weight() const { return static_cast<A>(kl_scale * (ramp.data ? read<double>(ramp, 0) : 1.0)); }
  __device__ bool has_label(int64_t row) const { return labels.is_class(row, cols); }
};

// A target's logits in a step; -inf beyond the row's end.
template <class A>
__device__ void target_step(const Mixed<A>& op, int64_t row, int64_t r, int64_t col, A (&t)[kStep]) {
  const bool least = op.mix.data == nullptr;
#pragma unroll
  for (int i = 0; i < kStep; ++i) t[i] = least ? infinity<A>() : A(0);
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A w = least ? A(1) : op.weight(row, r, m);
    if (w == 0) continue;
    A z[kStep], origin = op.stats.max(m, row);
    if (least && op.has_label(row)) {
      const A at_label = read_one<A>(op.networks[m], row, op.labels.at(row));
      origin = is_masked(at_label) ? origin : at_label;
    }
    read(op.networks[m], row, col, op.cols, -infinity<A>(), z);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A c = z[i] - origin;
      t[i] = least ? (c < t[i] ? c : t[i]) : t[i] + w * c;
    }
  }
#pragma unroll
  for (int i = 0; i < kStep; ++i) t[i] = col + i < op.cols ? t[i] : -infinity<A>();
}

// The sums of a target over its row; every thread gets the result.
template <int kThreads, class A>
__device__ Softmax<A> target_side(const Mixed<A>& op, int64_t row, int64_t r, A& sum_1) {
  const A rate = op.rate();
  A top = -infinity<A>();
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A t[kStep];
    target_step(op, row, r, col, t);
    top = max_of(t, top);
  });
  top = finite_max(group_reduce<kThreads>(top, Max{}));
  A sum = 0;
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A t[kStep];
    target_step(op, row, r, col, t);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A c = t[i] - top;
      sum += exp2(c * rate);
      if (op.target_ce) sum_1 += exp2(c * A(kLog2E));
    }
  });
  sum_1 = group_reduce<kThreads>(sum_1, Add{});
  return {top, group_reduce<kThreads>(sum, Add{})};
}

template <int kThreads, class A>
__device__ Raised<A> target_raised(const Mixed<A>& op, int64_t row, int64_t r, Softmax<A> side) {
  Raised<A> raised;
  const A rate = op.rate();
  const LogSoftmax<A> log_p(side, rate);
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A t[kStep];
    target_step(op, row, r, col, t);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A p = exp2((t[i] - side.max) * rate) * log_p.inverse;
      raised.add(p, log_p(t[i]), fast_log2(p + op.eps), !is_masked(t[i]));
    }
  });
  raised.rise = group_reduce<kThreads>(raised.rise, Add{});
  raised.logs = group_reduce<kThreads>(raised.logs, Add{});
  raised.live = group_reduce<kThreads>(raised.live, Add{});
  return raised;
}

// KL(target || learner) of near rows; every thread gets it.
template <int kThreads, class A>
__device__ A near_kl(const Mixed<A>& op, int64_t row, int64_t r, int64_t learner, const NearRow<A>& near) {
  A sum = 0;
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A t[kStep], z[kStep];
    target_step(op, row, r, col, t);
    read(op.networks[learner], row, col, op.cols, -infinity<A>(), z);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += near.term(t[i], z[i]);
  });
  return group_reduce<kThreads>(sum, Add{});
}

// Learners [first, first + kCount) of target r, as many as there are: their statistics, and what they add to the value.
template <int kThreads, int kCount, class A>
__device__ void learners_of(const Mixed<A>& op, int64_t row, int64_t r, Softmax<A> side, const Raised<A>& raised,
                            int64_t first, A& kl, A& ce) {
  const A rate = op.rate();
  A top[kCount], sum[kCount], sum_1[kCount];
  Shared<A> shared[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    top[k] = first + k < op.learners ? op.stats.max(first + k, row) : A(0);
    sum[k] = sum_1[k] = 0;
  }
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A t[kStep];
    target_step(op, row, r, col, t);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (first + k >= op.learners) break;
      A z[kStep];
      read(op.networks[first + k], row, col, op.cols, -infinity<A>(), z);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A c_q = z[i] - top[k], c_t = t[i] - side.max;
        sum[k] += exp2(c_q * rate);
        sum_1[k] += exp2(c_q * A(kLog2E));
        shared[k].add(exp2(c_t * rate), c_t, c_q);
      }
    }
  });
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int64_t learner = first + k;
    if (learner >= op.learners) break;
    sum[k] = group_reduce<kThreads>(sum[k], Add{});
    sum_1[k] = group_reduce<kThreads>(sum_1[k], Add{});
    shared[k].dot = group_reduce<kThreads>(shared[k].dot, Add{});
    shared[k].centred = group_reduce<kThreads>(shared[k].centred, Add{});
    shared[k].extra = group_reduce<kThreads>(shared[k].extra, Add{});
    A plain = divergence(side.sum, sum[k], shared[k].dot, rate);
    if (plain < A(kNear) && side.sum > 0) {
      plain = near_kl<kThreads>(op, row, r, learner, NearRow<A>(side.max, top[k], side.sum, sum[k], rate, false));
    }
    const EpsKl<A> of_row = eps_kl(plain, side.sum, sum[k], raised, shared[k], rate, op.eps);
    kl += of_row.value;
    if (!leads<kThreads>()) continue;
    if (op.labels.index) {
      if (op.has_label(row)) {
        ce += cross_entropy(sum_1[k], read_one<A>(op.networks[learner], row, op.labels.at(row)) - top[k]);
      } else {
        ce = sum_1[k] = not_a_number<A>();
      }
    }
    op.stats.sum(learner, row) = sum[k];
    op.stats.sum_1(learner, row) = sum_1[k];
    op.stats.mass(learner, row) = of_row.mass;
    op.stats.slope(learner, row) = of_row.slope;
  }
}

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) mixed_forward_kernel(Mixed<A> op, A* values) {
  const int64_t row = group_index<kThreads>();
  if (row >= op.rows) return;
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A top = row_max<kThreads, A>(op.networks[m], row, op.cols);
    if (leads<kThreads>()) op.stats.max(m, row) = top;
  }
  group_sync<kThreads>();
  A kl = 0, ce = 0;
  for (int64_t r = 0; r < op.targets; ++r) {
    A sum_1 = 0;
    const Softmax<A> side = target_side<kThreads>(op, row, r, sum_1);
    const Raised<A> raised = op.eps == 0 ? Raised<A>{} : target_raised<kThreads>(op, row, r, side);
    if (leads<kThreads>()) {
      if (op.target_ce) {
        const bool valid = op.has_label(row);
        A at_label = 0;
        for (int64_t m = 0; valid && m < op.networks.count; ++m) {
          const A w = op.weight(row, r, m);
          if (w != 0) at_label += w * (read_one<A>(op.networks[m], row, op.labels.at(row)) - op.stats.max(m, row));
        }
        if (!valid) sum_1 = not_a_number<A>();
        ce += cross_entropy(sum_1, at_label - side.max);
      }
      op.stats.target_max(r, row) = side.max;
      op.stats.target_sum(r, row) = side.sum;
      op.stats.target_sum_1(r, row) = sum_1;
    }
    if (op.targets > 1) {
      learners_of<kThreads, 1>(op, row, r, side, raised, r, kl, ce);
      continue;
    }
    for (int64_t first = 0; first < op.learners; first += kAtOnce) {
      learners_of<kThreads, kAtOnce>(op, row, r, side, raised, first, kl, ce);
    }
  }
  if (!leads<kThreads>()) return;
  const A t = op.temperature[0];
  values[row] = weighed(op.kl_weight() * (t * t), kl) + weighed(static_cast<A>(op.ce_scale), ce);
}

// Gradients of the loss in the targets' logits [targets, rows, cols], in the type of sums: what each network takes its
// share of. A thread has no place for those of all targets.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    target_grad_kernel(Mixed<A> op, Column grad, bool through_targets, A* target_grads) {
  const Part at = part<kThreads>(op.cols);
  const int64_t row = at.row % op.rows, r = at.row / op.rows;
  if (r >= op.targets) return;
  const A upstream = read<A>(grad, 0), kl = upstream * op.kl_weight() * op.temperature[0], rate = op.rate();
  const A ce = upstream * static_cast<A>(op.ce_scale);
  const Softmax<A> side = op.stats.target(r, row);
  const LogSoftmax<A> log_p(side, rate);
  const A coef_1 = op.target_ce ? of_1(ce, op.stats.target_sum_1(r, row)) : A(0);
  const int64_t label = op.target_ce ? op.labels.at(row) : -1;
  const Matrix to{target_grads + r * op.rows * op.cols, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float,
                  op.cols, 1};
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A t[kStep], out[kStep];
    target_step(op, row, r, col, t);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      out[i] = (coef_1 != 0 ? coef_1 * exp2((t[i] - side.max) * A(kLog2E)) : A(0)) - (col + i == label ? ce : A(0));
    }
    const int64_t first = op.targets == 1 ? 0 : r, end = op.targets == 1 ? op.learners : r + 1;
    for (int64_t learner = first; through_targets && kl != 0 && learner < end; ++learner) {
      const A slope = op.stats.slope(learner, row);
      if (slope == infinity<A>()) continue;
      const LogSoftmax<A> log_q(op.stats.learner(learner, row), rate);
      A z[kStep];
      read(op.networks[learner], row, col, op.cols, -infinity<A>(), z);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A p = exp2((t[i] - side.max) * rate) * log_p.inverse;
        const A log_raised = op.eps == 0 ? log_p(t[i]) : fast_log2(p + op.eps);
        out[i] += kl * target_term(p, log_raised, log_q(z[i]), A(kLog2E) * slope);
      }
    }
    write(to, row, col, at.end, out);
  });
}

// Gradients in the networks: of the learners their own, and each network's share of the targets'.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    network_grad_kernel(Mixed<A> op, Column grad, const A* target_grads, void* grads, int64_t element_size,
                        int64_t written) {
  const Part at = part<kThreads>(op.cols);
  const int64_t row = at.row;
  if (row >= op.rows) return;
  const A upstream = read<A>(grad, 0), kl = upstream * op.kl_weight() * op.temperature[0], rate = op.rate();
  const A ce = op.labels.index ? upstream * static_cast<A>(op.ce_scale) : A(0);
  const int64_t label = op.labels.index ? op.labels.at(row) : -1;
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A t[kStep];
    if (op.targets == 1) target_step(op, row, 0, col, t);
    for (int64_t m = 0; m < written; ++m) {
      A out[kStep] = {};
      if (m < op.learners) {
        const int64_t r = op.target_of(m);
        if (op.targets > 1) target_step(op, row, r, col, t);
        const Softmax<A> target = op.stats.target(r, row), learner = op.stats.learner(m, row);
        const LearnerGrad<A> g =
            learner_grad(target, learner, op.stats.sum_1(m, row), op.stats.mass(m, row), op.eps, kl, ce);
        A z[kStep];
        read(op.networks[m], row, col, op.cols, A(0), z);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const A c = z[i] - learner.max;
          const bool live = !(is_masked(z[i]) && is_masked(t[i]));
          // A term without weight adds 0, whatever it is.
          const A of_kl = kl == 0 ? A(0) : learner_term(g, exp2((t[i] - target.max) * rate), exp2(c * rate), live);
          const A of_ce = ce == 0 ? A(0) : g.of_1 * exp2(c * A(kLog2E)) - (col + i == label ? ce : A(0));
          out[i] = of_kl + of_ce;
        }
      }
      for (int64_t r = 0; target_grads && r < op.targets; ++r) {
        const A w = op.weight(row, r, m);
        const A* from = target_grads + (r * op.rows + row) * op.cols + col;
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          if (w != 0 && col + i < at.end && from[i] != 0) out[i] += w * from[i];
        }
      }
      const Matrix to{static_cast<char*>(grads) + m * op.rows * op.cols * element_size, op.networks.dtype, op.cols, 1};
      write(to, row, col, at.end, out);
    }
  });
}

// Gradient in the weights: sum over the classes of the target's gradient times the network's centred logit.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    mix_grad_kernel(Mixed<A> op, const A* target_grads, Mix mix_grad) {
  const int64_t row = group_index<kThreads>();
  if (row >= op.rows) return;
  for (int64_t r = 0; r < mix_grad.targets; ++r) {
    const A* from = target_grads + (r * op.rows + row) * op.cols;
    for (int64_t first = 0; first < mix_grad.networks; first += kAtOnce) {
      A dot[kAtOnce] = {};
      for_steps<kThreads>(0, op.cols, [&](int64_t col) {
        A g[kStep];
#pragma unroll
        for (int i = 0; i < kStep; ++i) g[i] = col + i < op.cols ? from[col + i] : A(0);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (first + k >= mix_grad.networks) break;
          A z[kStep];
          read(op.networks[first + k], row, col, op.cols, -infinity<A>(), z);
          const A top = op.stats.max(first + k, row);
#pragma unroll
          for (int i = 0; i < kStep; ++i) dot[k] += weight_term(g[i], z[i] - top);
        }
      });
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k >= mix_grad.networks) break;
        const A sum = group_reduce<kThreads>(dot[k], Add{});
        if (!leads<kThreads>()) continue;
        const Column to = mix_grad.column(row, r);
        write_one(Matrix{to.data, to.dtype, 0, to.stride}, 0, first + k, sum);
      }
    }
  }
}

// ---- teachers_kl
template <class A>
struct Taught {
  Matrix student;
  Networks teachers;
  Labels labels;
  Column weight;
  Temperature<A> temperature;
  int64_t rows, cols;
  Kind kind;
  TeacherStats<A> stats;

  __device__ A rate() const { return temperature.rate(0); }
  __device__ bool cross() const { return kind == Kind::kCrossEntropy; }
  __device__ A weight_of(int64_t m) const { return weight.data ? read<A>(weight, m) : A(1); }
};

// log2 of the teachers' mean probabilities in a step.
template <class A>
__device__ void mean_step(const Taught<A>& op, int64_t row, int64_t col, A (&log_r)[kStep]) {
  const A rate = op.rate();
  A top[kStep], sum[kStep];
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    top[i] = -infinity<A>();
    sum[i] = 0;
  }
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t m = 0; m < op.teachers.count; ++m) {
      const LogSoftmax<A> log_p(op.stats.teacher(m, row), rate);
      A z[kStep];
      read(op.teachers[m], row, col, op.cols, -infinity<A>(), z);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A log = log_p(z[i]);
        if (pass == 0) {
          top[i] = log > top[i] ? log : top[i];
        } else {
          sum[i] += exp2(log - finite_max(top[i]));
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kStep; ++i) log_r[i] = mean_log(top[i], sum[i], static_cast<A>(op.teachers.count));
}

// KL(teacher m || student) of near rows; every thread gets it.
template <int kThreads, class A>
__device__ A near_kl(const Taught<A>& op, int64_t row, int64_t m, const NearRow<A>& near) {
  A sum = 0;
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A z[kStep], student[kStep];
    read(op.teachers[m], row, col, op.cols, -infinity<A>(), z);
    read(op.student, row, col, op.cols, -infinity<A>(), student);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += near.term(z[i], student[i]);
  });
  return group_reduce<kThreads>(sum, Add{});
}

// Statistics of the rows, and their cross-entropies in `ce`.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) teachers_forward_kernel(Taught<A> op, A* ce) {
  const int64_t row = group_index<kThreads>();
  if (row >= op.rows) return;
  const A max_q = row_max<kThreads, A>(op.student, row, op.cols), rate = op.rate();
  A sum_q = 0, sum_1 = 0;
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A z[kStep];
    read(op.student, row, col, op.cols, -infinity<A>(), z);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      sum_q += exp2((z[i] - max_q) * rate);
      sum_1 += exp2((z[i] - max_q) * A(kLog2E));
    }
  });
  sum_q = group_reduce<kThreads>(sum_q, Add{});
  sum_1 = group_reduce<kThreads>(sum_1, Add{});
  for (int64_t m = 0; m < op.teachers.count; ++m) {
    const A max_p = row_max<kThreads, A>(op.teachers[m], row, op.cols);
    A sum_p = 0, dot = 0;
    for_steps<kThreads>(0, op.cols, [&](int64_t col) {
      A z[kStep], student[kStep];
      read(op.teachers[m], row, col, op.cols, -infinity<A>(), z);
      read(op.student, row, col, op.cols, -infinity<A>(), student);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A c = z[i] - max_p, e = exp2(c * rate);
        sum_p += e;
        dot += divergence_term(e, c, student[i] - max_q, op.cross());
      }
    });
    sum_p = group_reduce<kThreads>(sum_p, Add{});
    dot = group_reduce<kThreads>(dot, Add{});
    A value = op.kind == Kind::kReverse ? A(0) : divergence(sum_p, sum_q, dot, rate, op.cross());
    if (op.kind == Kind::kKl && value < A(kNear) && sum_p > 0) {
      value = near_kl<kThreads>(op, row, m, NearRow<A>(max_p, max_q, sum_p, sum_q, rate, true));
    }
    if (leads<kThreads>()) {
      op.stats.set_teacher(m, row, {max_p, sum_p});
      op.stats.value(m, row) = value;
    }
  }
  group_sync<kThreads>();
  A reverse = 0;
  if (op.kind == Kind::kReverse) {
    const LogSoftmax<A> log_q(Softmax<A>{max_q, sum_q}, rate);
    // The second time in terms that do not cancel, if the rows are near.
    for (int near = 0; near < 2; ++near) {
      A sum = 0;
      for_steps<kThreads>(0, op.cols, [&](int64_t col) {
        A z[kStep], log_r[kStep];
        read(op.student, row, col, op.cols, -infinity<A>(), z);
        mean_step(op, row, col, log_r);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const A log = log_q(z[i]), q = exp2(log);
          sum += near ? near_reverse_term(q, log, log_r[i]) : A(kLn2) * reverse_term(q, log, log_r[i]);
        }
      });
      reverse = group_reduce<kThreads>(sum, Add{});
      if (!(reverse < A(kNear)) || sum_q == 0) break;
    }
  }
  if (!leads<kThreads>()) return;
  if (op.kind == Kind::kReverse) op.stats.value(0, row) = reverse;
  A term = 0;
  if (op.labels.index) {
    const int64_t label = op.labels.at(row);
    const bool valid = op.labels.is_class(row, op.cols);
    if (!valid) sum_1 = not_a_number<A>();
    term = cross_entropy(sum_1, valid ? read_one<A>(op.student, row, label) - max_q : A(0));
  }
  op.stats.at(0, row) = max_q;
  op.stats.at(1, row) = sum_q;
  op.stats.sum_1(row) = sum_1;
  ce[row] = term;
}

// A row of the loss.
template <class A>
struct TaughtValue {
  TeacherStats<A> stats;
  Column weight;
  Temperature<A> temperature;
  const A* ce;  // null: none
  A scale, ce_scale;
  bool reverse;

  __device__ A operator()(int64_t row) const {
    const A t = temperature[0];
    A value = reverse ? stats.value(0, row) : A(0);
    for (int64_t m = 0; !reverse && m < stats.count; ++m) {
      value += weighed(weight.data ? read<A>(weight, m) : A(1), stats.value(m, row));
    }
    return weighed(scale * (t * t), value) + (ce ? weighed(ce_scale, ce[row]) : A(0));
  }
};

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    teachers_backward_kernel(Taught<A> op, Column grad, A scale, A ce_scale, Matrix to_student, void* to_teachers,
                             int64_t element_size) {
  const Part at = part<kThreads>(op.cols);
  const int64_t row = at.row;
  if (row >= op.rows) return;
  const A upstream = read<A>(grad, 0), kl = upstream * (scale * op.temperature[0]), rate = op.rate();
  const A ce = op.labels.index ? upstream * ce_scale : A(0);
  const bool reverse = op.kind == Kind::kReverse;
  const int64_t label = op.labels.index ? op.labels.at(row) : -1;
  const LogSoftmax<A> log_q(op.stats.student(row), rate);
  const A coef_1 = of_1(ce, op.stats.sum_1(row));
  const A row_kl = A(kLog2E) * op.stats.value(0, row);
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A z[kStep], out[kStep];
    read(op.student, row, col, op.cols, A(0), z);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      out[i] = (coef_1 == 0 ? A(0) : coef_1 * exp2((z[i] - log_q.max) * A(kLog2E))) - (col + i == label ? ce : A(0));
    }
    if (reverse && kl != 0) {
      A log_r[kStep];
      mean_step(op, row, col, log_r);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        out[i] += reverse_grad(exp2(log_q(z[i])), log_q(z[i]), log_r[i], row_kl, A(kLn2) * kl);
      }
    }
    for (int64_t m = 0; !reverse && m < op.teachers.count; ++m) {
      const Softmax<A> p = op.stats.teacher(m, row);
      const LogSoftmax<A> log_p(p, rate);
      const A share = kl * op.weight_of(m), value = op.stats.value(m, row);
      const A of_q = p.sum == 0 ? A(0) : share * log_q.inverse, of_p = share * log_p.inverse;
      const A of_teacher = value == infinity<A>() ? A(0) : A(kLn2) * share;
      A other[kStep], taken[kStep];
      read(op.teachers[m], row, col, op.cols, A(0), other);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A e = exp2((other[i] - p.max) * rate);
        // A teacher without weight adds 0, whatever it is.
        if (share != 0) out[i] += of_q * exp2((z[i] - log_q.max) * rate) - of_p * e;
        taken[i] = of_teacher == 0 ? A(0)
                                   : teacher_term(e * log_p.inverse, log_p(other[i]), log_q(z[i]), A(kLog2E) * value,
                                                  of_teacher, op.cross());
      }
      if (!to_teachers) continue;
      const Matrix to{static_cast<char*>(to_teachers) + m * op.rows * op.cols * element_size, op.teachers.dtype,
                      op.cols, 1};
      write(to, row, col, at.end, taken);
    }
    if (to_student.data) write(to_student, row, col, at.end, out);
  });
}

// ---- aekd
constexpr int64_t kSlabs = 16;  // at most, of rows that a thread adds up

// sums[slab, m, c] = sum over the slab's rows of q - p_m, one thread for each.
template <class A>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    difference_kernel(Taught<A> op, int64_t slabs, int64_t per_slab, double* sums) {
  const int64_t blocks = (op.cols + kBlock - 1) / kBlock;
  const int64_t col = blockIdx.x % blocks * kBlock + threadIdx.x, m = blockIdx.x / blocks % op.teachers.count,
                slab = blockIdx.x / blocks / op.teachers.count;
  if (col >= op.cols) return;
  const Matrix teacher = op.teachers[m];
  double sum = 0;
  const A rate = op.rate();
  const int64_t end = (slab + 1) * per_slab < op.rows ? (slab + 1) * per_slab : op.rows;
  for (int64_t row = slab * per_slab; row < end; ++row) {
    const Softmax<A> q = op.stats.student(row), p = op.stats.teacher(m, row);
    sum += static_cast<double>(exp2((read_one<A>(op.student, row, col) - q.max) * rate) * q.inverse() -
                               exp2((read_one<A>(teacher, row, col) - p.max) * rate) * p.inverse());
  }
  sums[(slab * op.teachers.count + m) * op.cols + col] = sum;
}

// Adds the slabs into the first one.
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) add_slabs_kernel(double* sums, int64_t slabs, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (int64_t slab = 0; slab < slabs; ++slab) sum += sums[slab * size + i];
  sums[i] = sum;
}

// G of sums [count, cols]: a block for each entry.
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    gram_kernel(const double* sums, int64_t count, int64_t cols, double* gram) {
  const int64_t i = blockIdx.x / count, j = blockIdx.x % count;
  double dot = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kBlock) dot += sums[i * cols + c] * sums[j * cols + c];
  dot = group_reduce<kBlock>(dot, Add{});
  if (threadIdx.x == 0) gram[blockIdx.x] = dot;
}

// One thread: a few weights.
template <class A>
__global__ void aekd_weights_kernel(double* gram, int64_t count, double slack, bool normalize, double* memory,
                                    A* weights) {
  if (threadIdx.x != 0) return;
  double *lengths = memory + simplex_memory(count), *exact = lengths + count;
  aekd_weights(gram, count, slack, normalize, memory, lengths, exact);
  for (int64_t m = 0; m < count; ++m) weights[m] = static_cast<A>(exact[m]);
}

__global__ void simplex_minimum_kernel(Matrix gram, Column slope, int64_t count, double cap, double* memory,
                                       double* a) {
  if (threadIdx.x != 0) return;
  double *g = memory + simplex_memory(count), *s = g + count * count;
  for (int64_t i = 0; i < count; ++i) {
    s[i] = read<double>(slope, i);
    for (int64_t j = 0; j < count; ++j) g[i * count + j] = read_one<double>(gram, i, j);
  }
  simplex_minimum(g, s, count, cap, memory, a);
}

// ---- the ops

template <class A>
struct Each {
  const A* values;

  __device__ A operator()(int64_t i) const { return values[i]; }
};

using Pair = std::tuple<Tensor, Tensor>;

template <class A>
Mixed<A> mixed_of(const std::vector<Tensor>& networks, const std::optional<Tensor>& mix,
                  const std::optional<Tensor>& labels, const std::optional<Tensor>& ramp,
                  const Temperature<A>& temperature, int64_t learners, double eps, double kl_scale, double ce_scale,
                  bool target_ce, const Tensor& stats) {
  const int64_t rows = networks[0].size(0), count = static_cast<int64_t>(networks.size());
  const int64_t targets = targets_of(mix, count);
  return {networks_of(networks),
          mix_of(mix, count),
          labels_of(labels),
          column(ramp),
          temperature,
          rows,
          networks[0].size(1),
          learners,
          targets,
          A(eps),
          kl_scale,
          ce_scale,
          target_ce,
          MixedStats<A>{static_cast<A*>(stats.data_ptr()), rows, count, learners, targets}};
}

Pair mixed_forward_cuda(std::vector<Tensor> networks, std::optional<Tensor> mix, std::optional<Tensor> labels,
                        std::optional<Tensor> ramp, std::optional<Tensor> temperatures, int64_t learners,
                        double temperature, double eps, double kl_scale, double ce_scale, int64_t divisor,
                        bool target_ce) {
  const OnDevice device(networks[0]);
  const int64_t rows = networks[0].size(0), cols = networks[0].size(1);
  const int64_t count = static_cast<int64_t>(networks.size()), targets = targets_of(mix, count);
  const ScalarType dtype = accumulator(networks, mix);
  Tensor loss = empty(networks[0], dtype, {}), values = empty(networks[0], dtype, {rows});
  Tensor stats = empty(networks[0], dtype, {mixed_stats(count, learners, targets), rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    A* each = static_cast<A*>(values.data_ptr());
    const Mixed<A> op = mixed_of<A>(networks, mix, labels, ramp, {temperature, temperatures}, learners, eps,
                                    kl_scale / divisor, ce_scale / divisor, target_ce, stats);
    launch_rows(device, mixed_forward_kernel<A, kWarp>, mixed_forward_kernel<A, kBlock>, rows, cols, 1, op, each);
    sum_of(device, loss, Each<A>{each}, rows, static_cast<A*>(loss.data_ptr()));
  });
  return {loss, stats};
}

Pair mixed_backward_cuda(Tensor grad, std::vector<Tensor> networks, std::optional<Tensor> mix,
                         std::optional<Tensor> labels, std::optional<Tensor> ramp, std::optional<Tensor> temperatures,
                         Tensor stats, int64_t learners, double temperature, double eps, double kl_scale,
                         double ce_scale, int64_t divisor, bool target_ce, bool through_targets, bool need_mix) {
  const OnDevice device(networks[0]);
  const int64_t rows = networks[0].size(0), cols = networks[0].size(1);
  const int64_t count = static_cast<int64_t>(networks.size()), targets = targets_of(mix, count);
  const bool flows = through_targets || target_ce;
  const int64_t written = flows ? count : learners;
  Tensor grads = empty(networks[0], networks[0].scalar_type(), {written, rows, cols});
  Tensor mix_grad = need_mix ? empty(*mix, mix->scalar_type(), {rows, mix->size(1), mix->size(2)})
                             : empty(grad, grad.scalar_type(), {0});
  Tensor target_grads = empty(stats, stats.scalar_type(), {flows ? targets : 0, rows, cols});
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    const Mixed<A> op = mixed_of<A>(networks, mix, labels, ramp, {temperature, temperatures}, learners, eps,
                                    kl_scale / divisor, ce_scale / divisor, target_ce, stats);
    const int64_t parts = blocks_for(cols, kPiece);
    A* of_targets = flows ? static_cast<A*>(target_grads.data_ptr()) : nullptr;
    if (flows) {
      launch_rows(device, target_grad_kernel<A, kWarp>, target_grad_kernel<A, kBlock>, rows * targets, cols, parts, op,
                  column(grad), through_targets, of_targets);
    }
    launch_rows(device, network_grad_kernel<A, kWarp>, network_grad_kernel<A, kBlock>, rows, cols, parts, op,
                column(grad), of_targets, grads.data_ptr(), grads.element_size(), written);
    if (need_mix) {
      launch_rows(device, mix_grad_kernel<A, kWarp>, mix_grad_kernel<A, kBlock>, rows, cols, 1, op, of_targets,
                  mix_of(mix_grad, count));
    }
  });
  return {grads, mix_grad};
}

template <class A>
Taught<A> taught_of(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& labels,
                    const std::optional<Tensor>& weight, Kind kind, const Temperature<A>& temperature,
                    const Tensor& stats) {
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  return {matrix(student),
          networks_of(teachers),
          labels_of(labels),
          column(weight),
          temperature,
          rows,
          student.size(1),
          kind,
          TeacherStats<A>{static_cast<A*>(stats.data_ptr()), rows, count}};
}

template <class A>
void taught_rows(const OnDevice& device, const Taught<A>& op, A* ce) {
  launch_rows(device, teachers_forward_kernel<A, kWarp>, teachers_forward_kernel<A, kBlock>, op.rows, op.cols, 1, op,
              ce);
}

Pair teachers_forward_cuda(Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                           std::optional<Tensor> weight, std::optional<Tensor> temperatures, std::string kind,
                           double temperature, double scale, int64_t divisor, double ce_scale, int64_t ce_divisor) {
  const OnDevice device(student);
  const int64_t rows = student.size(0), count = static_cast<int64_t>(teachers.size());
  const ScalarType dtype = accumulator(teachers, student);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {teacher_stats(count), rows});
  Tensor ce = empty(student, dtype, {rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Taught<A> op =
        taught_of<A>(student, teachers, labels, weight, kind_of(kind), {temperature, temperatures}, stats);
    A* each = static_cast<A*>(ce.data_ptr());
    taught_rows(device, op, each);
    const A ce_share = labels ? A(ce_scale / ce_divisor) : A(0);
    const TaughtValue<A> value{op.stats,           op.weight, op.temperature,           each,
                               A(scale / divisor), ce_share,  op.kind == Kind::kReverse};
    sum_of(device, loss, value, rows, static_cast<A*>(loss.data_ptr()));
  });
  return {loss, stats};
}

Pair teachers_backward_cuda(Tensor grad, Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                            std::optional<Tensor> weight, std::optional<Tensor> temperatures, Tensor stats,
                            std::string kind, double temperature, double scale, int64_t divisor, double ce_scale,
                            int64_t ce_divisor, bool need_student, bool need_teachers) {
  const OnDevice device(student);
  const int64_t rows = student.size(0), cols = student.size(1), count = static_cast<int64_t>(teachers.size());
  Tensor to_student =
      need_student ? empty(student, student.scalar_type(), {rows, cols}) : empty(grad, grad.scalar_type(), {0});
  Tensor to_teachers = need_teachers ? empty(teachers[0], teachers[0].scalar_type(), {count, rows, cols})
                                     : empty(grad, grad.scalar_type(), {0});
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    const Taught<A> op =
        taught_of<A>(student, teachers, labels, weight, kind_of(kind), {temperature, temperatures}, stats);
    launch_rows(device, teachers_backward_kernel<A, kWarp>, teachers_backward_kernel<A, kBlock>, rows, cols,
                blocks_for(cols, kPiece), op, column(grad), A(scale / divisor), A(ce_scale / ce_divisor),
                need_student ? matrix(to_student) : Matrix{}, need_teachers ? to_teachers.data_ptr() : nullptr,
                to_teachers.element_size());
  });
  return {to_student, to_teachers};
}

std::tuple<Tensor, Tensor, Tensor> aekd_forward_cuda(Tensor student, std::vector<Tensor> teachers,
                                                     std::optional<Tensor> temperatures, double temperature,
                                                     double scale, int64_t divisor, double slack, bool normalize) {
  const OnDevice device(student);
  const int64_t rows = student.size(0), cols = student.size(1), count = static_cast<int64_t>(teachers.size());
  const ScalarType dtype = accumulator(teachers, student);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {teacher_stats(count), rows}),
         weights = empty(student, dtype, {count}), ce = empty(student, dtype, {rows});
  const int64_t per_slab = rows > kSlabs ? blocks_for(rows, kSlabs) : 1;
  const int64_t slabs = rows > 0 ? blocks_for(rows, per_slab) : 1;
  Tensor sums = empty(student, ScalarType::Double, {slabs, count, cols});
  Tensor gram = empty(student, ScalarType::Double, {count, count});
  Tensor memory = empty(student, ScalarType::Double, {simplex_memory(count) + 2 * count});
  double *of_slabs = static_cast<double*>(sums.data_ptr()), *g = static_cast<double*>(gram.data_ptr());
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Taught<A> op =
        taught_of<A>(student, teachers, std::nullopt, weights, Kind::kKl, {temperature, temperatures}, stats);
    taught_rows(device, op, static_cast<A*>(ce.data_ptr()));
    launch(device, {slabs * count * blocks_for(cols, kBlock), kBlock}, difference_kernel<A>, op, slabs, per_slab,
           of_slabs);
    launch(device, {blocks_for(count * cols, kBlock), kBlock}, add_slabs_kernel, of_slabs, slabs, count * cols);
    launch(device, {count * count, kBlock}, gram_kernel, of_slabs, count, cols, g);
    launch(device, {1, kWarp}, aekd_weights_kernel<A>, g, count, slack, normalize,
           static_cast<double*>(memory.data_ptr()), static_cast<A*>(weights.data_ptr()));
    const TaughtValue<A> value{op.stats, op.weight, op.temperature, nullptr, A(scale / divisor), 0, false};
    sum_of(device, loss, value, rows, static_cast<A*>(loss.data_ptr()));
  });
  return {loss, stats, weights};
}

Tensor simplex_minimum_cuda(Tensor gram, Tensor slope, double cap) {
  const OnDevice device(gram);
  const int64_t count = slope.size(0);
  Tensor a = empty(slope, ScalarType::Double, {count});
  Tensor memory = empty(slope, ScalarType::Double, {simplex_memory(count) + count * count + count});
  launch(device, {1, kWarp}, simplex_minimum_kernel, matrix(gram), column(slope), count, cap,
         static_cast<double*>(memory.data_ptr()), static_cast<double*>(a.data_ptr()));
  return a;
}

}  // namespace
}  // namespace ensemble
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  using namespace kdfast::ensemble;
  m.impl("mixed_logits_kl", TORCH_BOX(&mixed_forward_cuda));
  m.impl("mixed_logits_kl_backward", TORCH_BOX(&mixed_backward_cuda));
  m.impl("teachers_kl", TORCH_BOX(&teachers_forward_cuda));
  m.impl("teachers_kl_backward", TORCH_BOX(&teachers_backward_cuda));
  m.impl("aekd", TORCH_BOX(&aekd_forward_cuda));
  m.impl("simplex_minimum", TORCH_BOX(&simplex_minimum_cuda));
}
