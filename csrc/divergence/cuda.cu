#include "common/rows.cuh"
#include "common/sum.cuh"
#include "divergence/host.h"

namespace kdfast {
namespace divergence {
namespace {

// Reads a step of two rows, with the class `skipped` masked, and everything beyond the end.
template <class A>
__device__ void read_pair(const Inputs<A>& in, int64_t row, int64_t col, int64_t skipped, A (&z_p)[kStep],
                          A (&z_q)[kStep]) {
  read(in.teacher, in.student, row, col, in.cols, -infinity<A>(), z_p, z_q);
  const int64_t at = skipped - col;
  if (at < 0 || at >= kStep) return;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    if (i == at) z_p[i] = z_q[i] = -infinity<A>();
  }
}

// ---- forward
template <class A>
struct Moments {
  A mean, std;
};

// With the std of n - 1. Values are taken less the first one: a constant row has no std at all.
template <int kThreads, class A>
__device__ Moments<A> moments_of(const Matrix& z, int64_t row, int64_t cols) {
  const A first = read_one<A>(z, row, 0);
  A sum = 0, square = 0;
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A x[kStep];
    read(z, row, col, cols, first, x);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += x[i] - first;
  });
  const A mean = group_reduce<kThreads>(sum, Add{}) / A(cols);
  for_steps<kThreads>(0, cols, [&](int64_t col) {
    A x[kStep];
    read(z, row, col, cols, first + mean, x);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A gap = col + i < cols ? (x[i] - first) - mean : A(0);
      square += gap * gap;
    }
  });
  square = group_reduce<kThreads>(square, Add{});
  return {first + mean, static_cast<A>(sqrt(square / A(cols > 1 ? cols - 1 : 1)))};
}

// A running softmax.
template <class A>
struct Running {
  A max = -infinity<A>(), sum = 0;

  __device__ void add(const A (&z)[kStep], A rate) {
    const A top = max_of(z, max);
    if (top > max) sum *= exp2((max - top) * rate);
    max = top;
    const A finite = finite_max(max);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += exp2((z[i] - finite) * rate);
  }

  template <int kThreads>
  __device__ Softmax<A> merged(A rate) const {
    const A top = group_reduce<kThreads>(max, Max{});
    const A total = group_reduce<kThreads>(is_masked(max) ? sum : sum * exp2((max - top) * rate), Add{});
    return {finite_max(top), total};
  }
};

template <int kThreads, class A>
__device__ void write_side(const Inputs<A>& in, bool of_teacher, int64_t row, const Softmax<A>& side,
                           const SideSums<A>& sums, const Moments<A>& m) {
  if (!is_leader<kThreads>()) return;
  const int64_t first = of_teacher ? kSide : 0;
  in.stats.set_softmax(first, row, side);
  in.stats[first + kSlope][row] = sums.slope;
  in.stats[first + kMoment][row] = sums.moment;
  in.stats[first + kMean][row] = m.mean;
  in.stats[first + kStd][row] = m.std;
}

template <class A, class F, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    divergence_forward_kernel(Inputs<A> in, F terms, A* values) {
  const int64_t row = group_index<kThreads>();
  if (row >= in.rows) return;
  if (in.is_masked(row)) {
    if (!is_leader<kThreads>()) return;
    values[row] = 0;
    return in.stats.clear(kStats, row);
  }
  Moments<A> moments_q{0, 1}, moments_p{0, 1};
  if (in.standardize) {
    moments_q = moments_of<kThreads, A>(in.student, row, in.cols);
    moments_p = moments_of<kThreads, A>(in.teacher, row, in.cols);
  }
  const A rate_q = in.rate(false, row, moments_q.std), rate_p = in.rate(true, row, moments_p.std);
  const bool has_label = !in.labels.index || in.labels.is_class(row, in.cols);
  const int64_t skipped = in.skipped(row);
  Running<A> running_p, running_q;
  for_steps<kThreads>(0, in.cols, [&](int64_t col) {
    A z_p[kStep], z_q[kStep];
    read_pair(in, row, col, skipped, z_p, z_q);
    running_p.add(z_p, rate_p);
    running_q.add(z_q, rate_q);
  });
  const Softmax<A> side_p = running_p.template merged<kThreads>(rate_p),
                   side_q = running_q.template merged<kThreads>(rate_q);
  const Sides<A> sides(LogSoftmax<A>(side_p, rate_p), LogSoftmax<A>(side_q, rate_q));
  terms.set_row(in.skew_of(row), sides.both());
  RowSums<A> sums{};
  for_steps<kThreads>(0, in.cols, [&](int64_t col) {
    A z_p[kStep], z_q[kStep];
    read_pair(in, row, col, skipped, z_p, z_q);
#pragma unroll 1
    for (int i = 0; i < kStep; ++i) {
      const Point<A> x = sides.at(z_p[i], z_q[i]);
      if (is_nowhere(x)) continue;
      const Term<A> t = terms(x);
      sums.value += t.value;
      sums.g_p += t.to_p;
      sums.g_q += t.to_q;
      if (!in.moments) continue;
      const A c_p = z_p[i] - side_p.max, c_q = z_q[i] - side_q.max;
      sums.gc_p += t.to_p == 0 ? A(0) : t.to_p * c_p;
      sums.gc_q += t.to_q == 0 ? A(0) : t.to_q * c_q;
      sums.pc_p += x.p == 0 ? A(0) : x.p * c_p;
      sums.pc_q += x.q == 0 ? A(0) : x.q * c_q;
    }
  });
  for (A* sum : {&sums.value, &sums.g_p, &sums.g_q}) *sum = group_reduce<kThreads>(*sum, Add{});
  if (in.moments) {
    for (A* sum : {&sums.gc_p, &sums.gc_q, &sums.pc_p, &sums.pc_q}) *sum = group_reduce<kThreads>(*sum, Add{});
  }
  if (sides.is_nan() || !has_label) sums.value = not_a_number<A>();
  write_side<kThreads>(in, false, row, side_q, SideSums<A>(sums.value, sums.g_q, sums.gc_q, sums.pc_q), moments_q);
  write_side<kThreads>(in, true, row, side_p, SideSums<A>(sums.value, sums.g_p, sums.gc_p, sums.pc_p), moments_p);
  if (is_leader<kThreads>()) values[row] = sums.value;
}

// ---- backward
template <int kThreads, class A>
__device__ void write_zeros(const Matrix& to, const Part& at) {
  if (!to.data) return;
  const A zeros[kStep] = {};
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) { write(to, at.row, col, at.end, zeros); });
}

template <class A, class F, int kThreads>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    divergence_backward_kernel(Inputs<A> in, F terms, A scale, Gradients to) {
  const Part at = part<kThreads>(in.cols);
  const int64_t row = at.row;
  if (row >= in.rows) return;
  const A factor = to.of_row(in, row, scale);
  if (factor == 0) {
    write_zeros<kThreads, A>(to.student, at);
    return write_zeros<kThreads, A>(to.teacher, at);
  }
  const Sides<A> sides(in.side(true, row), in.side(false, row));
  terms.set_row(in.skew_of(row), sides.both());
  const SideGrad<A> g_q = in.grad(false, row, factor), g_p = in.grad(true, row, factor);
  const int64_t skipped = in.skipped(row);
  for_steps<kThreads>(at.begin, at.end, [&](int64_t col) {
    A z_p[kStep], z_q[kStep];
    read_pair(in, row, col, skipped, z_p, z_q);
#pragma unroll 1
    for (int i = 0; i < kStep; ++i) {
      const Point<A> x = sides.at(z_p[i], z_q[i]);
      const bool nowhere = is_nowhere(x);
      const Term<A> t = nowhere ? Term<A>{0, 0, 0} : terms(x);
      z_q[i] = col + i == skipped ? A(0) : g_q(t.to_q, x.q, z_q[i]);
      z_p[i] = col + i == skipped ? A(0) : g_p(t.to_p, x.p, z_p[i]);
    }
    if (to.student.data) write(to.student, row, col, at.end, z_q);
    if (to.teacher.data) write(to.teacher, row, col, at.end, z_p);
  });
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void divergence(const Inputs<A>& in, const Form& form, A* values) const {
    dispatch_kind<A>(form, [&](const auto& terms) {
      using F = std::decay_t<decltype(terms)>;
      launch_rows(device, divergence_forward_kernel<A, F, kWarp>, divergence_forward_kernel<A, F, kBlock>, in.rows,
                  in.cols, 1, in, terms, values);
    });
  }

  template <class A>
  void divergence_backward(const Inputs<A>& in, const Form& form, A scale, const Gradients& to) const {
    dispatch_kind<A>(form, [&](const auto& terms) {
      using F = std::decay_t<decltype(terms)>;
      launch_rows(device, divergence_backward_kernel<A, F, kWarp>, divergence_backward_kernel<A, F, kBlock>, in.rows,
                  in.cols, blocks_for(in.cols, kPiece), in, terms, scale, to);
    });
  }

  template <class A, class Value>
  void reduce(const Value& value, int64_t rows, bool sum, const Tensor& like, A* out) const {
    if (sum) return sum_of(device, like, value, rows, out);
    if (rows == 0) return;
    launch(device, {blocks_for(rows, kPerSum), kBlock}, sum_kernel<Value, A, A>, value, rows, out, nullptr);
  }
};

}  // namespace
}  // namespace divergence
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::divergence::register_ops<kdfast::divergence::Cuda>(m);
}
