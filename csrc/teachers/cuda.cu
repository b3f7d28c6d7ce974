#include "common/rows.cuh"
#include "common/sum.cuh"
#include "teachers/host.h"

namespace kdfast {
namespace teachers {
namespace {

// log2 of the teachers' mean probabilities in a step.
template <class A>
__device__ void mean_step(const Teachers<A>& op, int64_t row, int64_t col, A (&log_r)[kStep]) {
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
__device__ A near_kl(const Teachers<A>& op, int64_t row, int64_t m, const NearRow<A>& near) {
  A sum = 0;
  for_steps<kThreads>(0, op.cols, [&](int64_t col) {
    A z[kStep], student[kStep];
    read(op.teachers[m], op.student, row, col, op.cols, -infinity<A>(), z, student);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += near.term(z[i], student[i]);
  });
  return group_reduce<kThreads>(sum, Add{});
}

// Statistics of the rows, and their cross-entropies in `ce`.
template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2)) teachers_forward_kernel(Teachers<A> op, A* ce) {
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
      read(op.teachers[m], op.student, row, col, op.cols, -infinity<A>(), z, student);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A c = z[i] - max_p, e = exp2(c * rate);
        sum_p += e;
        dot += divergence_term(e, c, student[i] - max_q, op.is_cross());
      }
    });
    sum_p = group_reduce<kThreads>(sum_p, Add{});
    dot = group_reduce<kThreads>(dot, Add{});
    A value = op.is_reverse() ? A(0) : kl_of_sums(sum_p, sum_q, dot, rate, op.is_cross());
    if (op.kind == Kind::kKl && value < A(kNear) && sum_p > 0) {
      value = near_kl<kThreads>(op, row, m, NearRow<A>(max_p, max_q, sum_p, sum_q, rate, true));
    }
    if (is_leader<kThreads>()) {
      op.stats.set_teacher(m, row, {max_p, sum_p});
      op.stats.value(m, row) = value;
    }
  }
  group_sync<kThreads>();
  A reverse = 0;
  if (op.is_reverse()) {
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
  if (!is_leader<kThreads>()) return;
  if (op.is_reverse()) op.stats.value(0, row) = reverse;
  A term = 0;
  if (op.labels.index) {
    const int64_t label = op.labels.at(row);
    const bool valid = op.labels.is_class(row, op.cols);
    if (!valid) sum_1 = not_a_number<A>();
    term = cross_entropy(sum_1, valid ? read_one<A>(op.student, row, label) - max_q : A(0));
  }
  op.stats.set_student(row, {max_q, sum_q}, sum_1);
  ce[row] = term;
}

// A row of the loss.
template <class A>
struct LossValue {
  Stats<A> stats;
  Column weight;
  Temperature<A> temperature;
  const A* ce;  // null: none
  A scale, ce_scale;
  bool reverse;

  __device__ A operator()(int64_t row) const {
    const A t = temperature[0];
    return weighted(scale * (t * t), stats.divergence(weight, reverse, row)) +
           (ce ? weighted(ce_scale, ce[row]) : A(0));
  }
};

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    teachers_backward_kernel(Teachers<A> op, Column grad, A scale, A ce_scale, Matrix to_student,
                             NetworkGrads to_teachers) {
  const Part at = part<kThreads>(op.cols);
  const int64_t row = at.row;
  if (row >= op.rows) return;
  const A upstream = read<A>(grad, 0), kl = upstream * (scale * op.temperature[0]), rate = op.rate();
  const A ce = op.labels.index ? upstream * ce_scale : A(0);
  const bool reverse = op.is_reverse();
  const int64_t label = op.labels.index ? op.labels.at(row) : -1;
  const LogSoftmax<A> log_q(op.stats.student(row), rate);
  const A coef_1 = cross_entropy_coef(ce, op.stats.sum_1(row));
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
      A other[kStep], grad_p[kStep];
      read(op.teachers[m], row, col, op.cols, A(0), other);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A e = exp2((other[i] - p.max) * rate);
        // A teacher without weight adds 0, whatever it is.
        if (share != 0) out[i] += of_q * exp2((z[i] - log_q.max) * rate) - of_p * e;
        grad_p[i] = of_teacher == 0 ? A(0)
                                    : teacher_term(e * log_p.inverse, log_p(other[i]), log_q(z[i]), A(kLog2E) * value,
                                                   of_teacher, op.is_cross());
      }
      if (to_teachers.data) write(to_teachers[m], row, col, at.end, grad_p);
    }
    if (to_student.data) write(to_student, row, col, at.end, out);
  });
}

// ---- aekd
constexpr int64_t kSlabs = 16;  // at most, of rows that a thread adds up

// sums[slab, m, c] = sum over the slab's rows of q - p_m, one thread for each.
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    difference_kernel(Teachers<A> op, int64_t slabs, int64_t per_slab, double* sums) {
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
__global__ void __launch_bounds__(kBlock, kMinBlocks) add_slabs_kernel(double* sums, int64_t slabs, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (int64_t slab = 0; slab < slabs; ++slab) sum += sums[slab * size + i];
  sums[i] = sum;
}

// G of sums [count, cols]: a block for each entry.
__global__ void __launch_bounds__(kBlock, kMinBlocks)
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
  if (threadIdx.x == 0) read_and_solve(gram, slope, count, cap, memory, a);
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  // -> the cross-entropies of the rows.
  template <class A>
  Tensor run_rows(const Teachers<A>& op, const Tensor& like) const {
    Tensor ce = empty(like, like.scalar_type(), {op.rows});
    launch_rows(device, teachers_forward_kernel<A, kWarp>, teachers_forward_kernel<A, kBlock>, op.rows, op.cols, 1, op,
                data<A>(ce));
    return ce;
  }

  template <class A>
  void forward(const Teachers<A>& op, const Scales& scales, const Tensor& loss) const {
    const Tensor ce = run_rows(op, loss);
    const LossValue<A> value{op.stats,     op.weight,      op.temperature, data<A>(ce),
                             A(scales.kl), A(scales.ce()), op.is_reverse()};
    sum_of(device, loss, value, op.rows, data<A>(loss));
  }

  template <class A>
  void backward(const Teachers<A>& op, const Column& grad, const Scales& scales, const Matrix& to_student,
                const NetworkGrads& to_teachers) const {
    launch_rows(device, teachers_backward_kernel<A, kWarp>, teachers_backward_kernel<A, kBlock>, op.rows, op.cols,
                blocks_for(op.cols, kPiece), op, grad, A(scales.kl), A(scales.ce()), to_student, to_teachers);
  }

  template <class A>
  void aekd(const Teachers<A>& op, double scale, double slack, bool normalize, A* weights, const Tensor& loss) const {
    const int64_t count = op.teachers.count, per_slab = op.rows > kSlabs ? blocks_for(op.rows, kSlabs) : 1;
    const int64_t slabs = op.rows > 0 ? blocks_for(op.rows, per_slab) : 1;
    const Tensor ce = run_rows(op, loss);
    Tensor sums = empty(loss, ScalarType::Double, {slabs, count, op.cols});
    Tensor gram = empty(loss, ScalarType::Double, {count, count});
    Tensor memory = empty(loss, ScalarType::Double, {simplex_memory(count) + 2 * count});
    launch(device, {slabs * count * blocks_for(op.cols, kBlock), kBlock}, difference_kernel<A>, op, slabs, per_slab,
           data<double>(sums));
    launch(device, {blocks_for(count * op.cols, kBlock), kBlock}, add_slabs_kernel, data<double>(sums), slabs,
           count * op.cols);
    launch(device, {count * count, kBlock}, gram_kernel, data<double>(sums), count, op.cols, data<double>(gram));
    launch(device, {1, kWarp}, aekd_weights_kernel<A>, data<double>(gram), count, slack, normalize,
           data<double>(memory), weights);
    const LossValue<A> value{op.stats, op.weight, op.temperature, nullptr, A(scale), 0, false};
    sum_of(device, loss, value, op.rows, data<A>(loss));
  }

  void simplex_minimum(const Matrix& gram, const Column& slope, int64_t count, double cap, double* memory,
                       double* a) const {
    launch(device, {1, kWarp}, simplex_minimum_kernel, gram, slope, count, cap, memory, a);
  }
};

}  // namespace
}  // namespace teachers
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::teachers::register_ops<kdfast::teachers::Cuda>(m);
}
