#include <torch/csrc/stable/ops.h>

#include "common/group.cuh"
#include "common/sum.cuh"
#include "pairwise/host.h"

namespace kdfast {
namespace pairwise {
namespace {

// ---- squared distances

// A block works on 32 x 32 pairs, a thread on 2 x 2 of them; 32 columns of their rows are in shared memory at a time.
constexpr int kTile = 32;
constexpr int kRow = kTile + 1;  // a row of the tile, padded so that a warp reads a column without bank conflicts

// A thread's elements of kTile rows and kCols columns of a matrix, 0 where it has none; neighbouring threads read
// neighbours in memory.
template <class A, int kCols>
__device__ Raw<A, kTile * kCols / kBlock> load_rows(const Matrix& x, int64_t i0, int64_t n, int64_t c0, int64_t dim) {
  constexpr int kDown = kBlock / kCols;
  const int64_t i = i0 + threadIdx.x / kCols, c = c0 + threadIdx.x % kCols;
  const int64_t left = c < dim ? n - i : 0, first = i * x.row_stride + c * x.col_stride;
  Raw<A, kTile * kCols / kBlock> raw;
  raw.gather(x.data, x.dtype, [&](int k) { return Element{kDown * k < left, first + kDown * k * x.row_stride}; });
  return raw;
}

// to[row * kPitch + column]
template <int kCols, int kPitch, class A, int kCount>
__device__ void store_rows(const Raw<A, kCount>& raw, ScalarType dtype, A* to) {
  A values[kCount];
  raw.convert(dtype, values);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    to[(threadIdx.x / kCols + kBlock / kCols * k) * kPitch + threadIdx.x % kCols] = values[k];
  }
}

// The squared distance of rows i of x and j of y goes to put(i, j, p); of x with itself also to put(j, i, p).
template <class Wide, class Put>
__global__ void __launch_bounds__(kBlock, sizeof(Wide) == 4 ? 4 : 3)
    squared_distances_kernel(Matrix x, int64_t n, Matrix y, int64_t m, int64_t dim, bool self, Put put) {
  const int64_t across = (m + kTile - 1) / kTile;
  const int64_t i0 = blockIdx.x / across * kTile, j0 = blockIdx.x % across * kTile;
  if (self && j0 < i0) return;
  KD_SHARED(Wide, rows, kTile * kRow);
  KD_SHARED(Wide, others, kTile * kRow);
  const int a = threadIdx.x / 16, b = threadIdx.x % 16;  // pairs (a, b), (a, b + 16), (a + 16, b), (a + 16, b + 16)
  Wide sum[2][2] = {};
  auto own = load_rows<Wide, kTile>(x, i0, n, 0, dim), other = load_rows<Wide, kTile>(y, j0, m, 0, dim);
  for (int64_t c0 = 0; c0 < dim; c0 += kTile) {
    __syncthreads();  // the previous columns have been used
    store_rows<kTile, kRow>(own, x.dtype, rows);
    store_rows<kTile, kRow>(other, y.dtype, others);
    __syncthreads();
    own = load_rows<Wide, kTile>(x, i0, n, c0 + kTile, dim);  // in flight during the sums
    other = load_rows<Wide, kTile>(y, j0, m, c0 + kTile, dim);
#pragma unroll 8
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const Wide difference = rows[(a + 16 * u) * kRow + c] - others[(b + 16 * v) * kRow + c];
          sum[u][v] += difference * difference;
        }
      }
    }
  }
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t i = i0 + a + 16 * u, j = j0 + b + 16 * v;
      if (i >= n || j >= m) continue;
      put(i, j, sum[u][v]);
      if (self && i0 != j0) put(j, i, sum[u][v]);
    }
  }
}

template <class Wide, class Put>
void for_squared_distances(const OnDevice& device, const Matrix& x, int64_t n, const Matrix& y, int64_t m, int64_t dim,
                           bool self, const Put& put) {
  if (n == 0 || m == 0) return;
  launch(device, {blocks_for(n, kTile) * blocks_for(m, kTile), kBlock}, squared_distances_kernel<Wide, Put>, x, n, y, m,
         dim, self, put);
}

template <class A>
struct PutDistance {
  A* out;
  int64_t cols;
  bool squared;

  __device__ void operator()(int64_t i, int64_t j, A p) const { out[i * cols + j] = squared ? p : std::sqrt(p); }
};

// The squared distances of one network [rows, rows]; lo and inverse (d = 1 / sqrt(p)) only for angles, lo only of a
// float32.
template <class A>
struct Pairs {
  int64_t rows;
  A *hi, *lo, *inverse;
};

template <class A, class Wide>
struct PutPair {
  Pairs<A> pairs;

  __device__ void operator()(int64_t i, int64_t j, Wide p) const {
    const int64_t at = i * pairs.rows + j;
    const A hi = static_cast<A>(p);
    pairs.hi[at] = hi;
    if (pairs.lo) pairs.lo[at] = static_cast<A>(p - hi);
    if (pairs.inverse) pairs.inverse[at] = p > 0 ? static_cast<A>(1 / std::sqrt(p)) : A(0);
  }
};

// ---- weighted differences

// A block works on 32 rows and 64 columns of the result, a thread on 4 x 2 of them; 32 rows of y are in shared memory
// at a time.
constexpr int kWide = 64, kTall = kBlock / kTile;

template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    weighted_differences_kernel(Matrix weights, Matrix x, int64_t n, Matrix y, int64_t m, int64_t dim, Column factor,
                                Matrix out) {
  const int64_t across = (dim + kWide - 1) / kWide;
  const int64_t i0 = blockIdx.x / across * kTile, c0 = blockIdx.x % across * kWide;
  KD_SHARED(A, shares, kTile * kTile);
  KD_SHARED(A, others, kTile * kWide);
  const int row = threadIdx.x / kTile, col = threadIdx.x % kTile;  // rows row + 8 u, columns col + 32 v
  A own[4][2], sum[4][2] = {};
#pragma unroll
  for (int u = 0; u < 4; ++u) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t i = i0 + row + kTall * u, c = c0 + col + kTile * v;
      own[u][v] = i < n && c < dim ? read_one<A>(x, i, c) : A(0);
    }
  }
  for (int64_t j0 = 0; j0 < m; j0 += kTile) {
    const auto share = load_rows<A, kTile>(weights, i0, n, j0, m);
    const auto other = load_rows<A, kWide>(y, j0, m, c0, dim);
    __syncthreads();  // the previous rows have been used
    store_rows<kTile, kTile>(share, weights.dtype, shares);
    store_rows<kWide, kWide>(other, y.dtype, others);
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < kTile; ++j) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const A share = shares[(row + kTall * u) * kTile + j];
#pragma unroll
        for (int v = 0; v < 2; ++v) sum[u][v] += share * (own[u][v] - others[j * kWide + col + kTile * v]);
      }
    }
  }
  const A scale = factor.data ? read<A>(factor, 0) : A(1);
#pragma unroll
  for (int u = 0; u < 4; ++u) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t i = i0 + row + kTall * u, c = c0 + col + kTile * v;
      if (i < n && c < dim) write_one(out, i, c, scale * sum[u][v]);
    }
  }
}

// ---- rkd: distances. Sums run over the ordered pairs, of which i = j adds nothing.
template <class A>
struct DistanceValue {
  Pairs<A> pairs;

  __device__ double operator()(int64_t at) const {
    return at % (pairs.rows + 1) == 0 ? A(0) : floored_distance(pairs.hi[at]);
  }
};

// What the device has summed for the distance term, in this order.
enum Sum { kStudentSum, kTeacherSum, kLossSum, kSlopeSum, kAngleSum, kSums };

template <class A>
struct Gap {
  Pairs<A> student, teacher;
  const double* sums;

  // -> D^s; x: D^s / mu_s - D^t / mu_t, mu being the mean over i != j
  __device__ A operator()(int64_t at, A& x) const {
    const double pairs = static_cast<double>(student.rows) * (student.rows - 1);
    const A inverse_mu = static_cast<A>(pairs / sums[kStudentSum]);
    const A ratio = static_cast<A>(sums[kStudentSum] / sums[kTeacherSum]);
    const A d_s = floored_distance(student.hi[at]);
    x = distance_gap(d_s, floored_distance(teacher.hi[at]), inverse_mu, ratio);
    return d_s;
  }
};

template <class A>
struct LossValue {
  Gap<A> gap;

  __device__ double operator()(int64_t at) const {
    if (at % (gap.student.rows + 1) == 0) return 0;
    A x;
    gap(at, x);
    return huber(x, huber_slope(x, A(1)), A(0.5));
  }
};

template <class A>
struct SlopeValue {
  Gap<A> gap;

  __device__ double operator()(int64_t at) const {
    if (at % (gap.student.rows + 1) == 0) return 0;
    A x;
    const A d_s = gap(at, x);
    return huber_slope(x, A(1)) * d_s;
  }
};

// grad (+)= dL/dp of the distance term; `scale` is 2 distance_weight / rows^2.
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    distance_grad_kernel(Gap<A> gap, double scale, bool add, A* grad) {
  const int64_t rows = gap.student.rows, at = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= rows * rows) return;
  A share = 0;
  if (gap.student.hi[at] > A(kSmallest)) {
    A x;
    const A d_s = gap(at, x);
    const double mu = gap.sums[kStudentSum] / (static_cast<double>(rows) * (rows - 1));
    const A shift = static_cast<A>(scale * gap.sums[kSlopeSum] / (gap.sums[kStudentSum] * mu));
    share = (static_cast<A>(scale / mu) * huber_slope(x, A(1)) - shift) / d_s;
  }
  grad[at] = add ? grad[at] + share : share;
}

// ---- rkd: angles

constexpr int kSide = 16;  // a block processes 16 x 16 sides jk, a thread one of them, for every vertex i

// The squared distance of a pair and its inverse root.

template <class A>
struct PairEntry {
  Squared<A> p;
  A inverse;
};

template <class A>
__device__ PairEntry<A> load_pair(const Pairs<A>& pairs, int64_t i, int64_t j) {
  if (i >= pairs.rows || j >= pairs.rows) return {{A(0), A(0)}, A(0)};
  const int64_t at = i * pairs.rows + j;
  return {{pairs.hi[at], pairs.lo ? pairs.lo[at] : A(0)}, pairs.inverse[at]};
}

// A network's triangle: the cosine at the vertex between sides a and b, and half the product of their inverses.
template <class A>
struct Vertex {
  A half_product, cos;

  __device__ Vertex(const PairEntry<A>& a, const PairEntry<A>& b, const PairEntry<A>& opposite)
      : half_product(A(0.5) * a.inverse * b.inverse), cos(cosine(a.p, b.p, opposite.p, half_product, A(1))) {}
};

// A thread processes every triangle of its side jk with all three angles, so the side's gradient accumulates in one
// register: only the loss is reduced across threads. Blocks are numbered over the pairs of tiles (t, u) with t <= u;
// losses [blocks]: h summed over the vertices i opposite the sides, and half of j = k (equal rows in one network only).
template <class A, bool kGradient>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    angle_kernel(Pairs<A> student, Pairs<A> teacher, A scale, double* losses, A* grad) {
  const int64_t rows = student.rows, tiles = (rows + kSide - 1) / kSide;
  const int64_t j0 = blockIdx.x / tiles * kSide, k0 = blockIdx.x % tiles * kSide;
  double loss = 0;
  if (j0 <= k0) {
    KD_SHARED(PairEntry<A>, to_j, 2 * kSide * kSide);  // student, teacher: [vertex, row]
    KD_SHARED(PairEntry<A>, to_k, 2 * kSide * kSide);
    const int own = threadIdx.x, row = own / kSide, col = own % kSide;
    const int64_t j = j0 + row, k = k0 + col;
    const bool side = j < k && k < rows;
    const PairEntry<A> jk_s = load_pair(student, j, k), jk_t = load_pair(teacher, j, k);
    A slope = 0;  // dL/dp_jk, up to the scale
    for (int64_t i0 = 0; i0 < rows; i0 += kSide) {
      __syncthreads();  // the previous vertices have been used
      to_j[own] = load_pair(student, i0 + row, j0 + col);
      to_j[own + kSide * kSide] = load_pair(teacher, i0 + row, j0 + col);
      to_k[own] = load_pair(student, i0 + row, k0 + col);
      to_k[own + kSide * kSide] = load_pair(teacher, i0 + row, k0 + col);
      __syncthreads();
      if (!side) continue;
      A sum = 0;
      for (int c = 0; c < kSide && i0 + c < rows; ++c) {
        if (i0 + c == j || i0 + c == k) continue;
        const PairEntry<A>&ij_s = to_j[c * kSide + row], &ij_t = to_j[(c + kSide) * kSide + row];
        const PairEntry<A>&ik_s = to_k[c * kSide + col], &ik_t = to_k[(c + kSide) * kSide + col];
        const Vertex<A> i_s(ij_s, ik_s, jk_s);
        const A x_i = i_s.cos - Vertex<A>(ij_t, ik_t, jk_t).cos, u_i = huber_slope(x_i, A(1));
        sum += huber(x_i, u_i, A(0.5));
        if (!kGradient) continue;
        const Vertex<A> j_s(ij_s, jk_s, ik_s), k_s(ik_s, jk_s, ij_s);
        const A u_j = huber_slope(j_s.cos - Vertex<A>(ij_t, jk_t, ik_t).cos, A(1));
        const A u_k = huber_slope(k_s.cos - Vertex<A>(ik_t, jk_t, ij_t).cos, A(1));
        slope += u_j * j_s.half_product + u_k * k_s.half_product - u_i * i_s.half_product;
        slope -= (u_j * j_s.cos + u_k * k_s.cos) * (A(0.5) * jk_s.inverse * jk_s.inverse);
      }
      loss += sum;
    }
    if (side && (jk_s.inverse == 0) != (jk_t.inverse == 0)) loss += 0.5;
    if (kGradient && side) grad[j * rows + k] = grad[k * rows + j] = scale * slope;
    if (kGradient && j == k && j < rows) grad[j * rows + j] = 0;
  }
  loss = group_reduce<kBlock>(loss, Add{});
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// loss = distance_scale sum of h over pairs + angle_scale sum over angles; a term of scale 0 was not summed.
template <class A>
__global__ void loss_kernel(const double* sums, double distance_scale, double angle_scale, A* loss) {
  double value = 0;
  if (distance_scale != 0) value += distance_scale * sums[kLossSum];
  if (angle_scale != 0) value += angle_scale * sums[kAngleSum];
  *loss = static_cast<A>(value);
}

template <class A>
struct Rkd {
  const OnDevice& device;
  Pairs<A> student, teacher;
  Tensor sums;
  A* grad;  // dL/dp; null: not needed

  double* sum(Sum which) const { return static_cast<double*>(sums.data_ptr()) + which; }

  void angles(double scale) const {
    const int64_t tiles = blocks_for(student.rows, kSide), blocks = tiles * tiles;
    Tensor losses = empty(sums, ScalarType::Double, {blocks});
    double* each = static_cast<double*>(losses.data_ptr());
    launch(device, {blocks, kBlock}, grad ? angle_kernel<A, true> : angle_kernel<A, false>, student, teacher,
           static_cast<A>(2 * scale), each, grad);
    sum_of(device, sums, Partial{each}, blocks, sum(kAngleSum));
  }

  void distances(double scale, bool add) const {
    const int64_t n = student.rows * student.rows;
    const Gap<A> gap{student, teacher, sum(kStudentSum)};
    sum_of(device, sums, DistanceValue<A>{student}, n, sum(kStudentSum));
    sum_of(device, sums, DistanceValue<A>{teacher}, n, sum(kTeacherSum));
    sum_of(device, sums, LossValue<A>{gap}, n, sum(kLossSum));
    if (!grad) return;
    sum_of(device, sums, SlopeValue<A>{gap}, n, sum(kSlopeSum));
    launch(device, {blocks_for(n, kBlock), kBlock}, distance_grad_kernel<A>, gap, 2 * scale, add, grad);
  }
};

template <class A>
void rkd_rows(const OnDevice& device, const Tensor& student, const Tensor& teacher, double distance_weight,
              double angle_weight, A* grad, A* loss) {
  const int64_t rows = student.size(0);
  const bool angles = angle_weight != 0 && rows > 1, distances = distance_weight != 0 && rows > 1;
  const bool single = sizeof(A) == 4;
  const int64_t each = !angles ? 1 : single ? 3 : 2;
  Tensor pairs = empty(student, single ? ScalarType::Float : ScalarType::Double, {2 * each, rows, rows});
  const auto of = [&](int64_t first) {
    A* hi = static_cast<A*>(pairs.data_ptr()) + first * rows * rows;
    return Pairs<A>{rows, hi, angles && single ? hi + 2 * rows * rows : nullptr, angles ? hi + rows * rows : nullptr};
  };
  const Rkd<A> terms{device, of(0), of(each), empty(student, ScalarType::Double, {kSums}), grad};
  const auto fill = [&](auto wide, const Tensor& x, const Pairs<A>& p) {
    using Wide = decltype(wide);
    for_squared_distances<Wide>(device, matrix(x), rows, matrix(x), rows, x.size(1), true, PutPair<A, Wide>{p});
  };
  for (int side = 0; side < 2 && (angles || distances); ++side) {
    const Tensor& x = side ? teacher : student;
    const Pairs<A>& p = side ? terms.teacher : terms.student;
    angles ? fill(double{}, x, p) : fill(A{}, x, p);
  }
  const double pairs_scale = distances ? distance_weight / (double(rows) * rows) : 0;
  const double angle_scale = angles ? 2 * angle_weight / (double(rows) * rows * rows) : 0;
  if (angles) terms.angles(angle_scale);
  if (distances) terms.distances(pairs_scale, angles);
  launch(device, {1, 1}, loss_kernel<A>, terms.sum(kStudentSum), pairs_scale, angle_scale, loss);
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void distances(const Tensor& x, const std::optional<Tensor>& y, bool squared, A* out) const {
    const int64_t n = x.size(0), m = y ? y->size(0) : n;
    for_squared_distances<A>(device, matrix(x), n, matrix(y ? *y : x), m, x.size(1), !y,
                             PutDistance<A>{out, m, squared});
  }

  template <class A>
  void weighted_differences(const Tensor& weights, const Matrix& x, const Matrix& y, int64_t dim, const Column& factor,
                            const Matrix& out) const {
    const int64_t n = weights.size(0), m = weights.size(1), blocks = blocks_for(n, kTile) * blocks_for(dim, kWide);
    if (blocks == 0) return;
    launch(device, {blocks, kBlock}, weighted_differences_kernel<A>, matrix(weights), x, n, y, m, dim, factor, out);
  }

  template <class A>
  void rkd(const Tensor& student, const Tensor& teacher, double distance_weight, double angle_weight, Tensor& memory,
           A* grad, A* loss) const {
    if (student.size(0) < 2 || (distance_weight == 0 && angle_weight == 0)) torch::stable::zero_(memory);  // no pair
    rkd_rows(device, student, teacher, distance_weight, angle_weight, grad, loss);
  }
};

}  // namespace
}  // namespace pairwise
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::pairwise::register_ops<kdfast::pairwise::Cuda>(m);
}
