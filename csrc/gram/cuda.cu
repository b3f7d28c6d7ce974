#include <torch/csrc/stable/ops.h>

#include <array>

#include "common/group.cuh"
#include "common/sum.cuh"
#include "gram/host.h"

namespace kdfast {
namespace gram {
namespace {

constexpr int kTile = 64, kDepth = 16;  // a block has kTile x kTile results, a thread 4 x 4; kDepth terms at a time
constexpr int kRow = kTile + 1;         // padded, so that a column is read without bank conflicts
constexpr int kPer = 4, kAcross = kTile / kPer;

// A batch of matrices [Z, rows, cols] of any strides.
struct Batch {
  void* data;
  ScalarType dtype;
  int64_t count, rows, cols, batch_stride, row_stride, col_stride;

  explicit Batch(const Tensor& x)
      : data(x.data_ptr()),
        dtype(x.scalar_type()),
        count(x.size(0)),
        rows(x.size(1)),
        cols(x.size(2)),
        batch_stride(x.stride(0)),
        row_stride(x.stride(1)),
        col_stride(x.stride(2)) {}

  // For a dtype that is known when the kernel is compiled, so that no branch depends on it.
  KD_HD Batch of_type(ScalarType known) const {
    Batch t = *this;
    t.dtype = known;
    return t;
  }

  KD_HD Batch transposed() const {
    Batch t = *this;
    t.rows = cols;
    t.cols = rows;
    t.row_stride = col_stride;
    t.col_stride = row_stride;
    return t;
  }

  template <class A>
  __device__ A get(int64_t z, int64_t i, int64_t j) const {
    if (i >= rows || j >= cols) return A(0);
    return read_one<A>(data, dtype, z * batch_stride + i * row_stride + j * col_stride);
  }

  template <class A>
  __device__ void put(int64_t z, int64_t i, int64_t j, A value) const {
    write_one(Matrix{data, dtype, 1, 0}, z * batch_stride + i * row_stride + j * col_stride, 0, value);
  }
};

constexpr int kEach = kTile * kDepth / kBlock;  // elements of a tile that a thread loads

// Its elements x[row0 + r][k0 + k] of kTile rows and kDepth columns, 0 where there is none; neighbouring threads read
// neighbours in memory.
template <class A>
__device__ Raw<A, kEach> load_tile(const Batch& x, int64_t z, int64_t row0, int64_t k0) {
  const bool along = x.col_stride <= x.row_stride;
  const int e = threadIdx.x;
  const int64_t row = row0 + (along ? e / kDepth : e % kTile), col = k0 + (along ? e % kDepth : e / kTile);
  const int64_t first = z * x.batch_stride + row * x.row_stride + col * x.col_stride;
  const int apart = along ? kBlock / kDepth : kBlock / kTile;  // rows, or columns
  const int64_t step = apart * (along ? x.row_stride : x.col_stride);
  const int64_t left = (along ? col < x.cols : row < x.rows) ? (along ? x.rows - row : x.cols - col) : 0;
  Raw<A, kEach> raw;
  raw.gather(x.data, x.dtype, [&](int i) { return Element{i * apart < left, first + i * step}; });
  return raw;
}

// to[k][r]
template <class A>
__device__ void store_tile(const Batch& x, const Raw<A, kEach>& raw, A* to) {
  A values[kEach];
  raw.convert(x.dtype, values);
  const bool along = x.col_stride <= x.row_stride;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = threadIdx.x + i * kBlock;
    to[(along ? e % kDepth : e / kTile) * kRow + (along ? e / kDepth : e % kTile)] = values[i];
  }
}

// sum[u][v] += x_i . y_j of kDepth terms, i = a + kAcross u, j = b + kAcross v.
template <class X, class A>
__device__ void add_terms(const X* x, const A* y, int depth, A (&sum)[kPer][kPer]) {
  const int a = threadIdx.x / kAcross, b = threadIdx.x % kAcross;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    A own[kPer], other[kPer];
#pragma unroll
    for (int u = 0; u < kPer; ++u) own[u] = static_cast<A>(x[k * kRow + a + kAcross * u]);
#pragma unroll
    for (int v = 0; v < kPer; ++v) other[v] = y[k * kRow + b + kAcross * v];
#pragma unroll
    for (int u = 0; u < kPer; ++u) {
#pragma unroll
      for (int v = 0; v < kPer; ++v) sum[u][v] += own[u] * other[v];
    }
  }
}

// sum += x_i . y_j over all columns, by tiles in `own` and `other`. Those of the next step are loaded during the sums
// of this one.
template <class A>
__device__ void add_products(const Batch& x, const Batch& y, int64_t z, int64_t i0, int64_t j0, A* own, A* other,
                             A (&sum)[kPer][kPer]) {
  i0 = opaque(i0);
  j0 = opaque(j0);
  Raw<A, kEach> raw_x = load_tile<A>(x, z, i0, 0), raw_y = load_tile<A>(y, z, j0, 0);
  for (int64_t k0 = 0; k0 < x.cols; k0 += kDepth) {
    __syncthreads();  // the previous terms have been used
    store_tile(x, raw_x, own);
    store_tile(y, raw_y, other);
    __syncthreads();
    raw_x = load_tile<A>(x, z, i0, k0 + kDepth);
    raw_y = load_tile<A>(y, z, j0, k0 + kDepth);
    add_terms(own, other, kDepth, sum);
  }
}

// f(i, j, sum) of a thread's results that exist.
template <class A, class F>
__device__ void for_results(int64_t i0, int64_t j0, int64_t n, int64_t m, const A (&sum)[kPer][kPer], const F& f) {
#pragma unroll
  for (int u = 0; u < kPer; ++u) {
#pragma unroll
    for (int v = 0; v < kPer; ++v) {
      const int64_t i = i0 + threadIdx.x / kAcross + kAcross * u, j = j0 + threadIdx.x % kAcross + kAcross * v;
      if (i < n && j < m) f(i, j, sum[u][v]);
    }
  }
}

// out_ij = factor x_i . y_j, rows of each. `self`: y is x, so that tiles below the diagonal are mirrored.
template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    product_kernel(Batch x, Batch y, bool self, Column factor, Batch out) {
  const int64_t down = (x.rows + kTile - 1) / kTile, across = (y.rows + kTile - 1) / kTile;
  const int64_t z = blockIdx.x / (down * across), i0 = blockIdx.x / across % down * kTile,
                j0 = blockIdx.x % across * kTile;
  if (self && j0 < i0) return;
  KD_SHARED(A, own, kDepth * kRow);
  KD_SHARED(A, other, kDepth * kRow);
  A sum[kPer][kPer] = {};
  add_products(x, y, z, i0, j0, own, other, sum);
  const A scale = factor.data ? read<A>(factor, 0) : A(1);
  for_results(i0, j0, x.rows, y.rows, sum, [&](int64_t i, int64_t j, A s) {
    out.put(z, i, j, scale * s);
    if (self && j0 > i0) out.put(z, j, i, scale * s);
  });
}

template <class A>
void write_products(const OnDevice& device, const Batch& x, const Batch& y, bool self, const Column& factor,
                    const Tensor& out) {
  const int64_t blocks = x.count * blocks_for(x.rows, kTile) * blocks_for(y.rows, kTile);
  if (blocks) launch(device, {blocks, kBlock}, product_kernel<A>, x, y, self, factor, Batch(out));
}

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

// The gradients of positions [i0, i0 + kTile) get what positions [j0, j0 + kTile) of u add, with signs [j][i].
template <class A>
__device__ void add_slopes(const Batch& u, const Batch& grad, int64_t b, int64_t i0, int64_t j0, const float* signs,
                           A* other) {
  const Batch by_channel = u.transposed();
  i0 = opaque(i0);
  j0 = opaque(j0);
  for (int64_t c0 = 0; c0 < u.cols; c0 += kTile) {
    A part[kPer][kPer] = {};
    Raw<A, kEach> raw = load_tile<A>(by_channel, b, c0, j0);
    for (int k0 = 0; k0 < kTile; k0 += kDepth) {
      __syncthreads();  // signs are there; the previous terms have been used
      store_tile(by_channel, raw, other);
      __syncthreads();
      if (k0 + kDepth < kTile) raw = load_tile<A>(by_channel, b, c0, j0 + k0 + kDepth);
      add_terms(signs + k0 * kRow, other, kDepth, part);
    }
    for_results(i0, c0, u.rows, u.cols, part,
                [&](int64_t i, int64_t c, A s) { grad.put(b, i, c, j0 == 0 ? s : grad.get<A>(b, i, c) + s); });
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    affinity_kernel(Batch units_s, Batch units_t, Batch slopes_s, Batch slopes_t, bool need_s, bool need_t,
                    double* losses) {
  const Batch student = units_s.of_type(kDtype<A>), teacher = units_t.of_type(kDtype<A>),
              grad_s = slopes_s.of_type(kDtype<A>), grad_t = slopes_t.of_type(kDtype<A>);
  const int64_t n = student.rows, down = (n + kTile - 1) / kTile;
  const int64_t b = blockIdx.x / down, i0 = blockIdx.x % down * kTile;
  KD_SHARED(A, own, kDepth * kRow);
  KD_SHARED(A, other, kDepth * kRow);
  KD_SHARED(float, signs, kTile* kRow);  // [j][i]
  double loss = 0;
  for (int64_t j0 = need_s || need_t ? 0 : i0; j0 < n; j0 += kTile) {
    A products[2][kPer][kPer] = {};
    add_products(student, student, b, i0, j0, own, other, products[0]);
    add_products(teacher, teacher, b, i0, j0, own, other, products[1]);
    A sum = 0;
#pragma unroll
    for (int u = 0; u < kPer; ++u) {
#pragma unroll
      for (int v = 0; v < kPer; ++v) {
        const A gap = products[0][u][v] - products[1][u][v];
        sum += std::abs(gap);
        signs[(threadIdx.x % kAcross + kAcross * v) * kRow + threadIdx.x / kAcross + kAcross * u] =
            static_cast<float>(sign(gap));
      }
    }
    loss += need_s || need_t || j0 == i0 ? sum : 2 * sum;
    if (need_s) add_slopes(student, grad_s, b, i0, j0, signs, other);
    if (need_t) add_slopes(teacher, grad_t, b, i0, j0, signs, other);
    __syncthreads();  // the signs have been used
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
    write_products<A>(device, Batch(a), Batch(b ? *b : a), !b, Column{}, out);
  }

  template <class A>
  void weighted_sums(const Tensor& weights, const Tensor& x, const Column& factor, const Tensor& out) const {
    write_products<A>(device, Batch(weights), Batch(x).transposed(), false, factor, out);
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

  template <class A>
  void affinity(const std::array<Tensor, 2>& networks, double eps, A* const (&slopes)[2], Tensor& loss) const {
    const int64_t batch = networks[0].size(0), positions = networks[0].size(2);
    if (batch == 0) {
      torch::stable::zero_(loss);
      return;
    }
    std::vector<Tensor> memory;  // of the unit positions
    std::vector<Batch> units, grads;
    for (int side = 0; side < 2; ++side) {
      const Tensor& x = networks[side];
      memory.push_back(empty(x, loss.scalar_type(), {batch, positions, x.size(1)}));
      units.emplace_back(memory.back());
      grads.push_back(units.back());
      grads.back().data = slopes[side];
      launch(device, {blocks_for(batch * positions, kBlock / kWarp), kBlock}, unit_kernel<A>, Batch(x),
             static_cast<A>(eps), data<A>(memory.back()));
    }
    const int64_t blocks = batch * blocks_for(positions, kTile);
    DeviceMemory<double> losses(loss, blocks + 1);
    launch(device, {blocks, kBlock}, affinity_kernel<A>, units[0], units[1], grads[0], grads[1], slopes[0] != nullptr,
           slopes[1] != nullptr, losses.data());
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
