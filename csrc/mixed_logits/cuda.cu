#include "common/rows.cuh"
#include "common/sum.cuh"
#include "mixed_logits/host.h"

namespace kdfast {
namespace mixed_logits {
namespace {

constexpr int kTile = 4;  // learners or weights that share a read of what they have in common

// Of the divergences, without T^2.
template <class A>
__device__ A kl_weight(const MixedLogits<A>& op) {
  return static_cast<A>(op.kl_scale * op.ramp_value());
}

// A target's logits in a step; -inf beyond the row's end.
template <class A>
__device__ void target_step(const MixedLogits<A>& op, int64_t row, int64_t r, int64_t col, A (&t)[kStep]) {
  const bool least = op.mix.data == nullptr;
#pragma unroll
  for (int i = 0; i < kStep; ++i) t[i] = least ? infinity<A>() : A(0);
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A w = least ? A(1) : op.weight(row, r, m);
    if (w == 0) continue;
    A z[kStep], origin = op.stats.max(m, row);
    if (least && op.labels.is_class(row, op.cols)) {
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
__device__ Softmax<A> target_side(const MixedLogits<A>& op, int64_t row, int64_t r, A& sum_1) {
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
__device__ SmoothedTargetSums<A> target_smoothed(const MixedLogits<A>& op, int64_t row, int64_t r, Softmax<A> side) {
  SmoothedTargetSums<A> smoothed;
  const A rate = op.rate();
  const LogSoftmax<A> log_p(side, rate);
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A t[kStep];
    target_step(op, row, r, col, t);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A p = exp2((t[i] - side.max) * rate) * log_p.inverse;
      smoothed.add(p, log_p(t[i]), fast_log2(p + op.eps), !is_masked(t[i]));
    }
  });
  smoothed.kl_to_smoothed = group_reduce<kThreads>(smoothed.kl_to_smoothed, Add{});
  smoothed.sum_log = group_reduce<kThreads>(smoothed.sum_log, Add{});
  smoothed.n_active = group_reduce<kThreads>(smoothed.n_active, Add{});
  return smoothed;
}

// KL(target || learner) of near rows; every thread gets it.
template <int kThreads, class A>
__device__ A near_kl(const MixedLogits<A>& op, int64_t row, int64_t r, int64_t learner, const NearRow<A>& near) {
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
__device__ void learners_of(const MixedLogits<A>& op, int64_t row, int64_t r, Softmax<A> side,
                            const SmoothedTargetSums<A>& smoothed, int64_t first, A& kl, A& ce) {
  const A rate = op.rate();
  A top[kCount], sum[kCount], sum_1[kCount];
  CrossSums<A> cross[kCount];
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
        cross[k].add(exp2(c_t * rate), c_t, c_q);
      }
    }
  });
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int64_t learner = first + k;
    if (learner >= op.learners) break;
    sum[k] = group_reduce<kThreads>(sum[k], Add{});
    sum_1[k] = group_reduce<kThreads>(sum_1[k], Add{});
    cross[k].dot = group_reduce<kThreads>(cross[k].dot, Add{});
    cross[k].sum_c = group_reduce<kThreads>(cross[k].sum_c, Add{});
    cross[k].n_masked_in_target = group_reduce<kThreads>(cross[k].n_masked_in_target, Add{});
    A plain = kl_of_sums(side.sum, sum[k], cross[k].dot, rate);
    if (plain < A(kNear) && side.sum > 0) {
      plain = near_kl<kThreads>(op, row, r, learner, NearRow<A>(side.max, top[k], side.sum, sum[k], rate, false));
    }
    const EpsKl<A> of_row = eps_kl(plain, side.sum, sum[k], smoothed, cross[k], rate, op.eps);
    kl += of_row.value;
    if (!is_leader<kThreads>()) continue;
    if (op.labels.index) {
      if (op.labels.is_class(row, op.cols)) {
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
__global__ void __launch_bounds__(kBlock, kMinBlocks) forward_kernel(MixedLogits<A> op, A* values) {
  const int64_t row = group_index<kThreads>();
  if (row >= op.rows) return;
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A top = row_max<kThreads, A>(op.networks[m], row, op.cols);
    if (is_leader<kThreads>()) op.stats.max(m, row) = top;
  }
  group_sync<kThreads>();
  A kl = 0, ce = 0;
  for (int64_t r = 0; r < op.targets; ++r) {
    A sum_1 = 0;
    const Softmax<A> side = target_side<kThreads>(op, row, r, sum_1);
    const SmoothedTargetSums<A> smoothed =
        op.eps == 0 ? SmoothedTargetSums<A>{} : target_smoothed<kThreads>(op, row, r, side);
    if (is_leader<kThreads>()) {
      if (op.target_ce) {
        const bool valid = op.labels.is_class(row, op.cols);
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
      learners_of<kThreads, 1>(op, row, r, side, smoothed, r, kl, ce);
      continue;
    }
    for (int64_t first = 0; first < op.learners; first += kTile) {
      learners_of<kThreads, kTile>(op, row, r, side, smoothed, first, kl, ce);
    }
  }
  if (!is_leader<kThreads>()) return;
  const A t = op.temperature[0];
  values[row] = weighted(kl_weight(op) * (t * t), kl) + weighted(static_cast<A>(op.ce_scale), ce);
}

// Gradients of the loss in the targets' logits [targets, rows, cols], in the type of sums. Scratch in global memory:
// too many targets to keep their gradients in registers.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    target_grad_kernel(MixedLogits<A> op, Gradients to, A* target_grads) {
  const Part at = part<kThreads>(op.cols);
  const int64_t row = at.row % op.rows, r = at.row / op.rows;
  if (r >= op.targets) return;
  const A upstream = read<A>(to.upstream, 0), kl = upstream * kl_weight(op) * op.temperature[0], rate = op.rate();
  const A ce = upstream * static_cast<A>(op.ce_scale);
  const Softmax<A> side = op.stats.target(r, row);
  const LogSoftmax<A> log_p(side, rate);
  const A coef_1 = op.target_ce ? cross_entropy_coef(ce, op.stats.target_sum_1(r, row)) : A(0);
  const int64_t label = op.target_ce ? op.labels.at(row) : -1;
  const Matrix out_r{target_grads + r * op.rows * op.cols, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float,
                     op.cols, 1};
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A t[kStep], out[kStep];
    target_step(op, row, r, col, t);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      out[i] = (coef_1 != 0 ? coef_1 * exp2((t[i] - side.max) * A(kLog2E)) : A(0)) - (col + i == label ? ce : A(0));
    }
    const int64_t first = op.targets == 1 ? 0 : r, end = op.targets == 1 ? op.learners : r + 1;
    for (int64_t learner = first; to.through_targets && kl != 0 && learner < end; ++learner) {
      const A slope = op.stats.slope(learner, row);
      if (slope == infinity<A>()) continue;
      const LogSoftmax<A> log_q(op.stats.learner(learner, row), rate);
      A z[kStep];
      read(op.networks[learner], row, col, op.cols, -infinity<A>(), z);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A p = exp2((t[i] - side.max) * rate) * log_p.inverse;
        const A log_smoothed = op.eps == 0 ? log_p(t[i]) : fast_log2(p + op.eps);
        out[i] += kl * target_term(p, log_smoothed, log_q(z[i]), A(kLog2E) * slope);
      }
    }
    write(out_r, row, col, at.end, out);
  });
}

// Gradients in the networks: of the learners their own, plus each network's shares of the targets'.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    network_grad_kernel(MixedLogits<A> op, Gradients to, const A* target_grads) {
  const Part at = part<kThreads>(op.cols);
  const int64_t row = at.row;
  if (row >= op.rows) return;
  const A upstream = read<A>(to.upstream, 0), kl = upstream * kl_weight(op) * op.temperature[0], rate = op.rate();
  const A ce = op.labels.index ? upstream * static_cast<A>(op.ce_scale) : A(0);
  const int64_t label = op.labels.index ? op.labels.at(row) : -1;
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A t[kStep];
    if (op.targets == 1) target_step(op, row, 0, col, t);
    for (int64_t m = 0; m < to.networks.count; ++m) {
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
          const bool active = !(is_masked(z[i]) && is_masked(t[i]));
          // A term without weight adds 0, whatever it is.
          const A of_kl = kl == 0 ? A(0) : learner_term(g, exp2((t[i] - target.max) * rate), exp2(c * rate), active);
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
      write(to.networks[m], row, col, at.end, out);
    }
  });
}

// Gradient in the weights: sum over the classes of the target's gradient times the network's centred logit.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    mix_grad_kernel(MixedLogits<A> op, const A* target_grads, Mix mix_grad) {
  const int64_t row = group_index<kThreads>();
  if (row >= op.rows) return;
  for (int64_t r = 0; r < mix_grad.targets; ++r) {
    const A* from = target_grads + (r * op.rows + row) * op.cols;
    for (int64_t first = 0; first < mix_grad.networks; first += kTile) {
      A dot[kTile] = {};
      for_steps<kThreads>(0, op.cols, [&](int64_t col) {
        A g[kStep];
#pragma unroll
        for (int i = 0; i < kStep; ++i) g[i] = col + i < op.cols ? from[col + i] : A(0);
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
          if (first + k >= mix_grad.networks) break;
          A z[kStep];
          read(op.networks[first + k], row, col, op.cols, -infinity<A>(), z);
          const A top = op.stats.max(first + k, row);
#pragma unroll
          for (int i = 0; i < kStep; ++i) dot[k] += weight_term(g[i], z[i] - top);
        }
      });
#pragma unroll
      for (int k = 0; k < kTile; ++k) {
        if (first + k >= mix_grad.networks) break;
        const A sum = group_reduce<kThreads>(dot[k], Add{});
        if (!is_leader<kThreads>()) continue;
        mix_grad.put(row, r, first + k, sum);
      }
    }
  }
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void forward(const MixedLogits<A>& op, const Tensor& loss) const {
    Tensor losses = empty(loss, loss.scalar_type(), {op.rows});
    launch_rows(device, forward_kernel<A, kWarp>, forward_kernel<A, kBlock>, op.rows, op.cols, 1, op, data<A>(losses));
    sum_of(device, loss, Each<A>{data<A>(losses)}, op.rows, data<A>(loss));
  }

  template <class A>
  void backward(const MixedLogits<A>& op, const Gradients& to, const Tensor& stats) const {
    const int64_t targets = to.has_target_grads ? op.targets : 0, parts = blocks_for(op.cols, kPiece);
    Tensor scratch = empty(stats, stats.scalar_type(), {targets, op.rows, op.cols});
    A* target_grads = data<A>(scratch, to.has_target_grads);
    if (to.has_target_grads) {
      launch_rows(device, target_grad_kernel<A, kWarp>, target_grad_kernel<A, kBlock>, op.rows * op.targets, op.cols,
                  parts, op, to, target_grads);
    }
    launch_rows(device, network_grad_kernel<A, kWarp>, network_grad_kernel<A, kBlock>, op.rows, op.cols, parts, op, to,
                target_grads);
    if (to.mix.data) {
      launch_rows(device, mix_grad_kernel<A, kWarp>, mix_grad_kernel<A, kBlock>, op.rows, op.cols, 1, op, target_grads,
                  to.mix);
    }
  }
};

}  // namespace
}  // namespace mixed_logits
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::mixed_logits::register_ops<kdfast::mixed_logits::Cuda>(m);
}
