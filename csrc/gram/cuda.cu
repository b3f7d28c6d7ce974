#include <torch/csrc/stable/ops.h>

#include <array>

#include "common/group.cuh"
#include "common/sum.cuh"
#include "common/tile.cuh"
#include "gram/host.h"

namespace kdfast {
namespace gram {
namespace {

// ---- comparisons: a block has a row
template <class A>
__global__ void inverse_norms_kernel(const A* student, const A* teacher, int64_t n, A eps, Stats<A> stats) {
  const int64_t row = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= stats.rows) return;
  stats.put(0, row, inverse_norm(student[row * n + row % n], eps));
  stats.put(1, row, inverse_norm(teacher[row * n + row % n], eps));
}

template <class F>
__device__ double sum_over(int64_t n, const F& f) {
  double sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kBlock) sum += f(j);
  return group_reduce<kBlock>(sum, Add{});
}

// Each fills the statistics of row i and gives its loss, to every thread.
template <class A, bool kAbsolute>
__device__ double compare_row(const Rows<A, kAbsolute>& f, const A* g, const A* h, int64_t i, int64_t n,
                              const Stats<A>& stats) {
  using F = Rows<A, kAbsolute>;
  const double square_s = sum_over(n, [&](int64_t j) { return static_cast<double>(g[j]) * g[j]; });
  const double square_t = sum_over(n, [&](int64_t j) { return static_cast<double>(h[j]) * h[j]; });
  if (threadIdx.x == 0) f.norms(square_s, square_t, i, stats);
  __syncthreads();
  const A inverse_s = stats.get(F::kInverseS, i), inverse_t = stats.get(F::kInverseT, i);
  const auto gap = [&](int64_t j) { return f.gap(g[j], h[j], i, stats); };
  const double along_s = sum_over(n, [&](int64_t j) { return double(f.slope(gap(j)) * (g[j] * inverse_s)); });
  const double along_t = sum_over(n, [&](int64_t j) { return double(-f.slope(gap(j)) * (h[j] * inverse_t)); });
  if (threadIdx.x == 0) {
    stats.put(F::kAlongS, i, inverse_s * A(kSmallestNorm) >= 1 ? A(0) : static_cast<A>(along_s));
    stats.put(F::kAlongT, i, inverse_t * A(kSmallestNorm) >= 1 ? A(0) : static_cast<A>(along_t));
  }
  return sum_over(n, [&](int64_t j) { return double(f.entry(gap(j))); });
}

template <class A>
__device__ double compare_row(const Distribution<A>& f, const A* g, const A* h, int64_t i, int64_t n,
                              const Stats<A>& stats) {
  using F = Distribution<A>;
  const A over_s =
      static_cast<A>(1 / sum_over(n, [&](int64_t j) { return double(f.sum_term(kStudent, g[j], i, j, stats)); }));
  const A over_t =
      static_cast<A>(1 / sum_over(n, [&](int64_t j) { return double(f.sum_term(kTeacher, h[j], i, j, stats)); }));
  double loss = 0, along_s = 0, along_t = 0;
  for (int64_t j = threadIdx.x; j < n; j += kBlock) {
    const A p = f.sum_term(kStudent, g[j], i, j, stats) * over_s, t = f.sum_term(kTeacher, h[j], i, j, stats) * over_t;
    A slope_s, slope_t;
    loss += f.entry(p, t, slope_s, slope_t);
    along_s += slope_s * p;
    along_t += slope_t * t;
  }
  along_s = group_reduce<kBlock>(along_s, Add{});
  along_t = group_reduce<kBlock>(along_t, Add{});
  if (threadIdx.x == 0) {
    stats.put(F::kOverS, i, over_s);
    stats.put(F::kOverT, i, over_t);
    stats.put(F::kAlongS, i, static_cast<A>(along_s));
    stats.put(F::kAlongT, i, static_cast<A>(along_t));
  }
  return group_reduce<kBlock>(loss, Add{});
}

template <class A, int kTerms>
__device__ double compare_row(const Cosines<A, kTerms>& f, const A* g, const A* h, int64_t i, int64_t n,
                              const Stats<A>& stats) {
  return sum_over(n, [&](int64_t j) {
    A slope_s, slope_t;
    return double(f.entry(g[j], h[j], i, j, stats, slope_s, slope_t));
  });
}

template <class A, class F>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    compare_kernel(F f, const A* student, const A* teacher, int64_t n, Stats<A> stats, double* losses) {
  const int64_t row = blockIdx.x;
  stats.first = row / n * n;
  const double loss = compare_row(f, student + row * n, teacher + row * n, row % n, n, stats);
  if (threadIdx.x == 0) losses[row] = loss;
}

template <class A, class F>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    weigh_kernel(F f, Side side, const A* student, const A* teacher, int64_t n, Stats<A> stats, A* weights) {
  const int64_t row = blockIdx.x, i = row % n;
  stats.first = row / n * n;
  const A *g = student + row * n, *h = teacher + row * n, *own = side == kStudent ? g : h;
  A* to = weights + row * n;
  const double along = sum_over(n, [&](int64_t j) {
    to[j] = f.weight(side, g[j], h[j], i, j, stats);
    return static_cast<double>(to[j]) * own[j];
  });
  if constexpr (F::kCosines) {
    const A norm = norm_of(own[i]);
    __syncthreads();  // to[i] is another thread's
    if (threadIdx.x == 0 && norm > 0) to[i] -= static_cast<A>(along) * stats.get(F::kInverseS + side, i) / norm;
  }
}

template <class A>
__global__ void loss_kernel(const double* sum, double scale, A* loss) {
  *loss = static_cast<A>(*sum * scale);
}

// ---- affinity. A block has kTile positions i of one sample and iterates over all positions j, so it owns the
// gradients of its positions: only the loss is reduced across blocks.
template <class A>
struct Affinity {
  static constexpr int kPer = 4;
  using Of = Tile<A, kPer>;
  using Sums = A[kPer][kPer];
  using Shared = Columns<A, kPer>;

  // sums = u_i . u_j
  static __device__ void products(const Operand<A>& u, int64_t b, int64_t i0, int64_t j0, Shared& shared, Sums& sums) {
    for_columns<A, kPer>(u, u, b, i0, j0, 0, u.cols, shared,
                         [&](int row, int col, A x, A y) { sums[row][col] += x * y; });
  }

  // grad_i += sum_j slope_ij u_j of `n` positions j, = where they are the first; slopes [j][i] in shared memory.
  template <class S>
  static __device__ void add_gradient(const S* slopes, int n, const Operand<A>& x, int64_t b, int64_t i0, int64_t j0,
                                      Shared& shared, A* grad) {
    A* const channels = shared.half(0);
    const int64_t positions = x.rows;
    const Operand<A> by_channel = x.transposed();
    for (int64_t c0 = 0; c0 < x.cols; c0 += Of::kSide) {
      Sums part = {};
      Fetch<A, A, kPer> next(by_channel, b, c0, j0);
      for (int k0 = 0; k0 < n; k0 += Of::kDepth) {
        next.load(positions - j0 - k0);
        __syncthreads();  // slopes are there; the previous terms have been used
        next.store(channels);
        __syncthreads();
        for_terms<kPer>(slopes + k0 * Of::kRow, channels,
                        [&](int row, int col, S slope, A y) { part[row][col] += slope * y; });
      }
#pragma unroll
      for (int u = 0; u < kPer; ++u) {
        const int64_t i = i0 + Of::at(threadIdx.x / kAcross, u);
        if (i >= positions) continue;
        A* const to = grad + (b * positions + i) * x.cols;
#pragma unroll
        for (int v = 0; v < kPer; ++v) {
          const int64_t c = c0 + Of::at(threadIdx.x % kAcross, v);
          if (c < x.cols) to[c] = j0 == 0 ? part[u][v] : to[c] + part[u][v];
        }
      }
    }
  }

  // Positions j of a tile whose slopes fit into shared memory at once.
  template <class Kind>
  static constexpr int kHeld = sizeof(typename Kind::Slope) == 8 ? Of::kSide / 2 : Of::kSide;

  // The same with a thread's own slopes, which go through shared memory; kAgain: after those of the other side.
  template <class Kind, bool kAgain>
  static __device__ void add_side(const Sums& own, const Operand<A>& x, int64_t b, int64_t i0, int64_t j0,
                                  Shared& shared, Neighbours<typename Kind::Slope>* slopes, A* grad) {
    using Slope = typename Kind::Slope;
    const int i = Of::at(threadIdx.x / kAcross, 0);
#pragma unroll
    for (int first = 0; first < Of::kSide; first += kHeld<Kind>) {
      if (kAgain || first > 0) __syncthreads();  // what was there has been used
#pragma unroll
      for (int v = 0; v < kPer; ++v) {
        Neighbours<Slope> some;
#pragma unroll
        for (int u = 0; u < kPer; ++u) some.x[u] = static_cast<Slope>(own[u][v]);
        const int j = Of::at(threadIdx.x % kAcross, v) - first;
        if (kHeld<Kind> == Of::kSide || (j >= 0 && j < kHeld<Kind>)) slopes[(j * Of::kRow + i) / kPack] = some;
      }
      add_gradient(slopes[0].x, kHeld<Kind>, x, b, i0, j0 + first, shared, grad);
    }
  }
};

// A null gradient is not needed.
template <class A, class Kind>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    affinity_kernel(Kind kind, Operand<A> student, Operand<A> teacher, A* grad_s, A* grad_t, double* losses) {
  using F = Affinity<A>;
  constexpr int kPer = F::kPer, kSide = F::Of::kSide;
  const int64_t n = student.rows, down = (n + kSide - 1) / kSide;
  const int64_t b = blockIdx.x / down, i0 = blockIdx.x % down * kSide;
  using Shared = Columns<A, kPer>;
  using Slope = typename Kind::Slope;
  KD_SHARED(Shared, shared, 1);
  KD_SHARED(Neighbours<Slope>, slopes, F::template kHeld<Kind> * F::Of::kRow / kPack);  // [j][i]
  const bool all = grad_s || grad_t;
  double loss = 0;
  for (int64_t j0 = all ? 0 : i0; j0 < n; j0 += kSide) {
    A of_s[kPer][kPer] = {}, of_t[kPer][kPer] = {};
    F::products(student, b, i0, j0, shared[0], of_s);
    F::products(teacher, b, i0, j0, shared[0], of_t);  // its barriers come after the last use of the slopes
    A sum = 0;
#pragma unroll
    for (int v = 0; v < kPer; ++v) {
#pragma unroll
      for (int u = 0; u < kPer; ++u) {
        A slope_s, slope_t;
        sum += kind.entry(of_s[u][v], of_t[u][v], slope_s, slope_t);
        of_s[u][v] = slope_s;
        of_t[u][v] = slope_t;
      }
    }
    loss += all || j0 == i0 ? sum : 2 * sum;
    if (grad_s) F::template add_side<Kind, false>(of_s, student, b, i0, j0, shared[0], slopes, grad_s);
    if (grad_t && grad_s && Kind::kOneSlope && F::template kHeld<Kind> == kSide) {
      F::add_gradient(slopes[0].x, kSide, teacher, b, i0, j0, shared[0], grad_t);
    } else if (grad_t) {
      F::template add_side<Kind, true>(of_t, teacher, b, i0, j0, shared[0], slopes, grad_t);
    }
  }
  loss = group_reduce<kBlock>(loss, Add{});
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// Unit positions [B, N, C] of x [B, C, N], contiguous; a warp has a position.
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks) unit_kernel(Batch x, A eps, A* units) {
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp;
  if (row >= x.count * x.cols) return;
  const int64_t b = row / x.cols, n = row % x.cols;
  A square = 0;
  for (int64_t c = threadIdx.x % kWarp; c < x.rows; c += kWarp) {
    const A v = x.get<A>(b, c, n);
    square += v * v;
  }
  const A inverse = inverse_norm(group_reduce<kWarp>(square, Add{}), eps);
  for (int64_t c = threadIdx.x % kWarp; c < x.rows; c += kWarp) units[row * x.rows + c] = x.get<A>(b, c, n) * inverse;
}

// slope [B, N, C] times factor: s_ij and s_ji are the same number.
template <class A>
__global__ void scale_kernel(A* x, int64_t n, A factor) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i < n) x[i] *= factor;
}

// dL/dx [B, C, N] from slope = dL/du [B, N, C]; a warp has a position.
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    affinity_backward_kernel(Batch x, Batch slope, A eps, Column upstream, Batch out) {
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp;
  if (row >= x.count * x.cols) return;
  const int64_t b = row / x.cols, n = row % x.cols;
  A square = 0, along = 0;
  for (int64_t c = threadIdx.x % kWarp; c < x.rows; c += kWarp) {
    const A v = x.get<A>(b, c, n);
    square += v * v;
    along += v * slope.get<A>(b, n, c);
  }
  square = group_reduce<kWarp>(square, Add{});
  along = group_reduce<kWarp>(along, Add{});
  const A norm = norm_of(square), inverse = inverse_norm(square, eps);
  along = norm > 0 ? along * inverse / norm : A(0);
  const A scale = read<A>(upstream, 0) * inverse;
  for (int64_t c = threadIdx.x % kWarp; c < x.rows; c += kWarp) {
    out.put(b, c, n, scale * (slope.get<A>(b, n, c) - along * x.get<A>(b, c, n)));
  }
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void inner_products(const Tensor& a, const std::optional<Tensor>& b, const Tensor& out) const {
    const bool same = !b || a.scalar_type() == b->scalar_type();
    dispatch_narrow<A>(same ? a.scalar_type() : kScalarType<A>, [&](auto tag) {
      using T = decltype(tag);
      std::optional<Tensor> copy, other_copy;
      const Operand<T> x = operand<T>(device, a, copy), y = b ? operand<T>(device, *b, other_copy) : x;
      sums_of<A, Product>(device, out, x, y, !b, Write<A, A>{data<A>(out), x.rows, y.rows, Column{}});
    });
  }

  template <class A>
  void weighted_sums(const Tensor& weights, const Tensor& x, const Column& factor, const Tensor& out) const {
    dispatch_narrow<A>(x.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      std::optional<Tensor> copy, other_copy;
      const Operand<A> w = operand<A>(device, weights, copy);
      const Operand<T> y = operand<T>(device, x, other_copy).transposed();
      write_as<T>(device, out, [&](const Tensor& to) {
        sums_of<A, Product>(device, weights, w, y, false, Write<A, T>{data<T>(to), w.rows, y.rows, factor});
      });
    });
  }

  template <class F, class A>
  void compare(const F& f, const Tensor& student, const Tensor& teacher, A* const (&weights)[2], Tensor& loss) const {
    const int64_t n = student.size(1), rows = student.size(0) * n;
    if (rows == 0) {
      torch::stable::zero_(loss);
      return;
    }
    DeviceMemory<A> memory(student, kStats * rows);
    DeviceMemory<double> losses(student, rows + 1);
    const Stats<A> stats{memory.data(), rows, 0};
    const A *g = data<const A>(student), *h = data<const A>(teacher);
    if constexpr (F::kCosines) {
      launch(device, {blocks_for(rows, kBlock), kBlock}, inverse_norms_kernel<A>, g, h, n, f.eps, stats);
    }
    launch(device, {rows, kBlock}, compare_kernel<A, F>, f, g, h, n, stats, losses.data());
    for (const Side side : {kStudent, kTeacher}) {
      if (!weights[side]) continue;
      launch(device, {rows, kBlock}, weigh_kernel<A, F>, f, side, g, h, n, stats, weights[side]);
    }
    write_loss<A>(losses, rows, 1 / static_cast<double>(student.numel()), loss);
  }

  template <class Kind, class A>
  void affinity(const Kind& kind, const std::array<Tensor, 2>& networks, double eps, A* const (&slopes)[2],
                Tensor& loss) const {
    const int64_t batch = networks[0].size(0), positions = networks[0].size(2);
    if (batch == 0) {
      torch::stable::zero_(loss);
      return;
    }
    const auto units = [&](const Tensor& x) {
      const int64_t channels = x.size(1);
      Tensor memory = empty(x, loss.scalar_type(), {batch, positions, channels});
      launch(device, {blocks_for(batch * positions, kBlock / kWarp), kBlock}, unit_kernel<A>, Batch(x),
             static_cast<A>(eps), data<A>(memory));
      return memory;
    };
    const Tensor student = units(networks[0]), teacher = units(networks[1]);
    const int64_t blocks = batch * blocks_for(positions, Tile<A, Affinity<A>::kPer>::kSide);
    DeviceMemory<double> losses(loss, blocks + 1);
    launch(device, {blocks, kBlock}, affinity_kernel<A, Kind>, kind, Operand<A>(Batch(student)),
           Operand<A>(Batch(teacher)), slopes[0], slopes[1], losses.data());
    const double scale = 1 / (static_cast<double>(batch) * positions * positions);
    write_loss<A>(losses, blocks, scale, loss);
    for (int side = 0; side < 2; ++side) {
      const int64_t n = batch * positions * networks[side].size(1);
      if (!slopes[side] || n == 0) continue;
      launch(device, {blocks_for(n, kBlock), kBlock}, scale_kernel<A>, slopes[side], n,
             static_cast<A>(side ? -2 * scale : 2 * scale));
    }
  }

  template <class A>
  void affinity_backward(const Column& upstream, const Tensor& slope, const Tensor& x, A eps, const Tensor& out) const {
    const int64_t blocks = blocks_for(x.size(0) * x.size(2), kBlock / kWarp);
    if (blocks == 0) return;
    launch(device, {blocks, kBlock}, affinity_backward_kernel<A>, Batch(x), Batch(slope), eps, upstream, Batch(out));
  }

 private:
  // scale times the sum of the first n; the sum itself goes behind them.
  template <class A>
  void write_loss(DeviceMemory<double>& losses, int64_t n, double scale, const Tensor& loss) const {
    sum_of(device, loss, Partial{losses.data()}, n, losses.data() + n);
    launch(device, {1, 1}, loss_kernel<A>, losses.data() + n, scale, data<A>(loss));
  }
};

}  // namespace
}  // namespace gram
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) { kdfast::gram::register_ops<kdfast::gram::Cuda>(m); }
