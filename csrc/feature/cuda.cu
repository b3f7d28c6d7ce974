#include "common/map_step.cuh"
#include "common/sum.cuh"
#include "feature/host.h"

namespace kdfast {
namespace feature {
namespace {

constexpr int64_t kPiece = 4 * kBlock * kStep;  // elements of a sample that one block works on

// What a kernel needs of two maps. Gradients are dense in their order.
struct MapPair {
  Map student, teacher;
  Order order;
  int64_t batch, pieces;

  MapPair(const Tensor& s, const Tensor& t)
      : student(map(s, Order(s))),
        teacher(map(t, Order(s))),
        order(s),
        batch(s.size(0)),
        pieces(blocks_for(order.size(), kPiece)) {}
  int64_t blocks() const { return batch * pieces; }
};

// One number per channel, times `factor`; none where the pointer is null.
template <class A>
struct Channels {
  Column values;
  A factor = 1;

  // Of the elements [at, at + kStep) of a sample.
  __device__ void read(const Order& order, int64_t at, A (&to)[kStep]) const {
    Walk walk(order, at);
    Raw<A, kStep> raw;
    raw.gather(values.data, values.dtype, [&](int) {
      const Element place{walk.inside(), (order.by_channel ? walk.inner : walk.outer) * values.stride};
      walk.advance();
      return place;
    });
    raw.convert(values.dtype, to);
#pragma unroll
    for (int i = 0; i < kStep; ++i) to[i] *= factor;
  }
};

// The same terms for every sample, or those of its norms and dots.
template <class Terms>
struct Same {
  Terms terms;

  __device__ Terms operator()(int64_t) const { return terms; }
};

template <class A, int kPower, bool kDots>
struct OfSample {
  const A* stats;
  int64_t batch;

  __device__ Normalized<A, kPower> operator()(int64_t b) const {
    if (kDots) return {stats[b], stats[batch + b], stats[2 * batch + b], stats[3 * batch + b]};
    return {stats[b], stats[batch + b]};
  }
};

// ---- sums

// sums [kSums, batch, pieces]: those of each piece.
template <class A, class Make>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    sum_kernel(MapPair maps, Make make, Channels<A> channels, double* sums) {
  using Kind = decltype(make(0));
  const int64_t b = blockIdx.x / maps.pieces, begin = blockIdx.x % maps.pieces * kPiece, size = maps.order.size();
  const int64_t end = begin + kPiece < size ? begin + kPiece : size;
  const Kind kind = make(b);
  A x = 0, y = 0, z = 0;
  for (int64_t at = begin + threadIdx.x * kStep; at < end; at += kBlock * kStep) {
    A s[kStep], t[kStep], m[kStep] = {};
    read(maps.student, maps.teacher, maps.order, b, at, s, t);
    if (Kind::kPerChannel) channels.read(maps.order, at, m);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (at + i >= end) continue;
      const ErrorTerms<A> terms = kind.terms(s[i], t[i], m[i]);
      x += terms.x;
      y += terms.y;
      z += terms.z;
    }
  }
  const A each[] = {x, y, z};
#pragma unroll
  for (int k = 0; k < Kind::kSums; ++k) {
    const double sum = group_reduce<kBlock>(static_cast<double>(each[k]), Add{});
    if (threadIdx.x == 0) sums[k * int64_t(gridDim.x) + blockIdx.x] = sum;
  }
}

template <class A, class Make>
Tensor sum_pieces(const OnDevice& device, const Tensor& like, const MapPair& maps, const Make& make,
                  const Channels<A>& channels) {
  constexpr int kSums = decltype(make.operator()(0))::kSums;
  Tensor sums = empty(like, ScalarType::Double, {kSums, maps.blocks()});
  if (maps.blocks() > 0) {
    launch(device, {maps.blocks(), kBlock}, sum_kernel<A, Make>, maps, make, channels,
           static_cast<double*>(sums.data_ptr()));
  }
  return sums;
}

// out[i] = scale times the sum of `pieces` values, or its root.
template <class A, bool kRoot>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    sample_kernel(const double* sums, int64_t pieces, double scale, A* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kBlock) sum += sums[blockIdx.x * pieces + i];
  sum = group_reduce<kBlock>(sum, Add{});
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<A>(scale * (kRoot ? std::sqrt(sum) : sum));
}

template <class A, bool kRoot>
void sum_samples(const OnDevice& device, const double* sums, int64_t samples, int64_t pieces, double scale, A* out) {
  if (samples == 0) return;
  launch(device, {samples, kBlock}, sample_kernel<A, kRoot>, sums, pieces, scale, out);
}

struct Scaled {
  const double* sums;
  double scale;

  __device__ double operator()(int64_t i) const { return scale * sums[i]; }
};

// ---- one sum per channel

// A block adds up 32 columns of kTall rows, a warp every eighth row of them: out[row of blocks][column].
constexpr int64_t kTall = 256;

template <class Value, class Sum>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    column_kernel(Value value, int64_t rows, int64_t cols, double scale, Sum* out) {
  const int64_t across = (cols + kWarp - 1) / kWarp, first = blockIdx.x / across * kTall;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t col = blockIdx.x % across * kWarp + lane, end = first + kTall < rows ? first + kTall : rows;
  double sum = 0;
  for (int64_t row = first + warp; row < end && col < cols; row += kWarps) sum += value(row, col);
  KD_SHARED(double, sums, kBlock);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || col >= cols) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane];
  out[blockIdx.x / across * cols + col] = static_cast<Sum>(scale * sum);
}

struct PartialColumn {
  const double* sums;
  int64_t cols;

  __device__ double operator()(int64_t row, int64_t col) const { return sums[row * cols + col]; }
};

// out[col] = scale times the sum of value(row, col) over the rows.
template <class Value, class Sum>
void sum_columns(const OnDevice& device, const Tensor& like, const Value& value, int64_t rows, int64_t cols,
                 double scale, Sum* out) {
  const int64_t down = rows > 0 ? blocks_for(rows, kTall) : 1, blocks = down * blocks_for(cols, kWarp);
  if (down == 1) {
    return launch(device, {blocks, kBlock}, column_kernel<Value, Sum>, value, rows, cols, scale, out);
  }
  Tensor partial = empty(like, ScalarType::Double, {down, cols});
  double* sums = static_cast<double*>(partial.data_ptr());
  launch(device, {blocks, kBlock}, column_kernel<Value, double>, value, rows, cols, 1.0, sums);
  sum_columns(device, like, PartialColumn{sums, cols}, down, cols, scale, out);
}

// Of maps read position by position: a column is a channel.
template <class A>
struct SquareColumn {
  Map student, teacher;
  int64_t positions;

  __device__ double operator()(int64_t row, int64_t channel) const {
    const int64_t b = row / positions, position = row % positions;
    const auto of = [&](const Map& x) {
      return read_one<A>(x.data, x.dtype, b * x.sample + position * x.outer + channel * x.inner);
    };
    return Square<A>{}.terms(of(student), of(teacher), A(0)).x;
  }
};

// Of maps read channel by channel: a warp adds up one channel of a sample. sums [batch, channels].
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks) channel_kernel(MapPair maps, double* sums) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, channels = maps.order.outer;
  if (row >= maps.batch * channels) return;
  const int64_t b = row / channels, channel = row % channels;
  const auto of = [&](const Map& x, int64_t i) {
    return read_one<A>(x.data, x.dtype, b * x.sample + channel * x.outer + i * x.inner);
  };
  A sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < maps.order.inner; i += kWarp) {
    sum += Square<A>{}.terms(of(maps.student, i), of(maps.teacher, i), A(0)).x;
  }
  const double total = group_reduce<kWarp>(static_cast<double>(sum), Add{});
  if (threadIdx.x % kWarp == 0) sums[row] = total;
}

template <class A>
void sum_channels(const OnDevice& device, const Tensor& like, const MapPair& maps, double scale, A* out) {
  const int64_t outer = maps.order.outer, inner = maps.order.inner;
  if (maps.order.by_channel) {
    const SquareColumn<A> value{maps.student, maps.teacher, outer};
    return sum_columns(device, like, value, maps.batch * outer, inner, scale, out);
  }
  Tensor partial = empty(like, ScalarType::Double, {maps.batch, outer});
  double* sums = static_cast<double*>(partial.data_ptr());
  if (maps.batch > 0) {
    launch(device, {blocks_for(maps.batch * outer, kWarps), kBlock}, channel_kernel<A>, maps, sums);
  }
  sum_columns(device, like, PartialColumn{sums, outer}, maps.batch, outer, scale, out);
}

// ---- slopes

// Gradients [batch, size], of which either may be absent: factor * grad * slope.
template <class A, class Make>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    slope_kernel(MapPair maps, Make make, Channels<A> channels, Column grad, A factor, Matrix to_s, Matrix to_t) {
  using Kind = decltype(make(0));
  const int64_t b = blockIdx.x / maps.pieces, begin = blockIdx.x % maps.pieces * kPiece, size = maps.order.size();
  const int64_t end = begin + kPiece < size ? begin + kPiece : size;
  const Kind kind = make(b);
  if (grad.data) factor *= read<A>(grad, b);
  for (int64_t at = begin + threadIdx.x * kStep; at < end; at += kBlock * kStep) {
    A s[kStep], t[kStep], m[kStep] = {};
    read(maps.student, maps.teacher, maps.order, b, at, s, t);
    if (Kind::kPerChannel) channels.read(maps.order, at, m);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const Slopes<A> slopes = kind.slopes(s[i], t[i], m[i]);
      s[i] = factor * slopes.student;
      t[i] = factor * slopes.teacher;
    }
    if (to_s.data) write(to_s, b, at, size, s);
    if (to_t.data) write(to_t, b, at, size, t);
  }
}

// ---- the pyramid

// A block works on one map, its threads on consecutive elements; or (kByChannel) on 32 channels, one for each lane. A
// warp adds up a cell, then comes the next one. cells [kMaxCells, lanes]: sums of differences, then slopes.
struct PyramidMaps {
  struct Strides {
    int64_t sample, channel, row, column;
  };
  Matrix student, teacher;  // data and dtype
  Strides of_student, of_teacher;
  Pyramid pyramid;
  int64_t batch, channels;
  bool by_channel;

  static Strides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }
  PyramidMaps(const Tensor& s, const Tensor& t)
      : student{s.data_ptr(), s.scalar_type()},
        teacher{t.data_ptr(), t.scalar_type()},
        of_student(strides(s)),
        of_teacher(strides(t)),
        pyramid(s.size(0) * s.size(1), s.size(2), s.size(3)),
        batch(s.size(0)),
        channels(s.size(1)),
        by_channel(Order(s).by_channel) {}
  int64_t tiles() const { return by_channel ? blocks_for(channels, kWarp) : channels; }

  // s - t of a sample and channel.
  template <class A>
  __device__ A difference(int64_t b, int64_t c, int64_t y, int64_t x) const {
    const auto of = [&](const Matrix& m, const Strides& to) {
      return read_one<A>(m.data, m.dtype, b * to.sample + c * to.channel + y * to.row + x * to.column);
    };
    return of(student, of_student) - of(teacher, of_teacher);
  }
};

template <class A, bool kGradient, bool kByChannel>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    pyramid_kernel(PyramidMaps maps, int64_t tiles, double* losses, Column grad, Matrix to_s, Matrix to_t) {
  constexpr int kLanes = kByChannel ? kWarp : 1;
  KD_SHARED(A, cells, kMaxCells * kLanes);
  const Pyramid& pyramid = maps.pyramid;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x / tiles, c = blockIdx.x % tiles * kLanes + (kByChannel ? lane : 0);
  const bool inside = c < maps.channels;
  // f(y, x) of this thread's elements of a cell.
  const auto elements = [&](int cell, const auto& f) {
    const int row = cell / pyramid.columns.segments, column = cell % pyramid.columns.segments;
    const int64_t top = pyramid.rows.begin[row], height = pyramid.rows.begin[row + 1] - top;
    const int64_t left = pyramid.columns.begin[column], width = pyramid.columns.begin[column + 1] - left;
    const int64_t first = kByChannel ? 0 : lane, n = inside ? height * width : 0;
    for (int64_t i = first; i < n; i += kByChannel ? 1 : kWarp) f(top + i / width, left + i % width);
  };
  A squares = 0;
  for (int cell = warp; cell < pyramid.cells(); cell += kWarps) {
    A sum = 0;
    elements(cell, [&](int64_t y, int64_t x) {
      const A d = maps.difference<A>(b, c, y, x);
      sum += d;
      squares += d * d;
    });
    if (!kByChannel) sum = group_reduce<kWarp>(sum, Add{});
    if (kByChannel || lane == 0) cells[cell * kLanes + (kByChannel ? lane : 0)] = sum;
  }
  __syncthreads();
  double loss = pyramid.own * static_cast<double>(squares);
  if (threadIdx.x < kLanes) loss += pool<kGradient>(pyramid, cells + threadIdx.x, kLanes);
  __syncthreads();
  if (!kGradient) {
    loss = group_reduce<kBlock>(loss, Add{});
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;
    return;
  }
  const A own = static_cast<A>(2 * pyramid.own), factor = read<A>(grad, 0);
  for (int cell = warp; cell < pyramid.cells(); cell += kWarps) {
    const A slope = cells[cell * kLanes + (kByChannel ? lane : 0)];
    elements(cell, [&](int64_t y, int64_t x) {
      const A value = factor * (own * maps.difference<A>(b, c, y, x) + slope);
      const int64_t at =
          kByChannel ? (y * pyramid.width + x) * maps.channels + c : (c * pyramid.height + y) * pyramid.width + x;
      if (to_s.data) write_one(to_s, b, at, value);
      if (to_t.data) write_one(to_t, b, at, -value);
    });
  }
}

template <class A, bool kGradient>
void run_pyramid(const OnDevice& device, const PyramidMaps& maps, double* losses, Column grad, Matrix to_s,
                 Matrix to_t) {
  const int64_t blocks = maps.batch * maps.tiles();
  if (blocks == 0) return;
  launch(device, {blocks, kBlock},
         maps.by_channel ? pyramid_kernel<A, kGradient, true> : pyramid_kernel<A, kGradient, false>, maps, maps.tiles(),
         losses, grad, to_s, to_t);
}

// f(make) with the terms that are the same for all samples.
template <class A, class F>
void dispatch_kind(int64_t kind, double boundary, bool per_channel, const F& f) {
  if (kind == kBoundary) {
    f(Same<Boundary<A>>{{static_cast<A>(boundary)}});
  } else if (kind == kPartial) {
    f(Same<Partial<A>>{});
  } else if (per_channel) {
    f(Same<Square<A>>{});
  } else {
    f(Same<PlainSquare<A>>{});
  }
}

double elements_of(const MapPair& maps) {
  const double n = static_cast<double>(maps.batch) * static_cast<double>(maps.order.size());
  return n < 1 ? 1 : n;
}

template <class A, int kPower>
void normalized_error(const OnDevice& device, const Tensor& like, const MapPair& maps, A* stats, A* loss) {
  const Channels<A> none{};
  {
    Tensor pieces = sum_pieces(device, like, maps, Same<Lengths<A>>{}, none);
    sum_samples<A, true>(device, static_cast<const double*>(pieces.data_ptr()), 2 * maps.batch, maps.pieces, 1, stats);
  }
  Tensor pieces = sum_pieces(device, like, maps, OfSample<A, kPower, false>{stats, maps.batch}, none);
  const double* sums = static_cast<const double*>(pieces.data_ptr());
  sum_of(device, like, Scaled{sums, 1 / elements_of(maps)}, maps.blocks(), loss);
  sum_samples<A, false>(device, sums + maps.blocks(), 2 * maps.batch, maps.pieces, 1, stats + 2 * maps.batch);
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void error(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& margin,
             const ErrorSettings& settings, A* out) const {
    const MapPair maps(student, teacher);
    if (settings.over == kChannel) return sum_channels(device, student, maps, settings.scale, out);
    const Channels<A> channels{column(margin)};
    dispatch_kind<A>(settings.kind, settings.boundary, false, [&](const auto& make) {
      Tensor pieces = sum_pieces(device, student, maps, make, channels);
      const double* sums = data<const double>(pieces);
      if (settings.over == kSample) {
        return sum_samples<A, false>(device, sums, maps.batch, maps.pieces, settings.scale, out);
      }
      sum_of(device, student, Scaled{sums, settings.scale}, maps.blocks(), out);
    });
  }

  template <class A>
  void error_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                      const std::optional<Tensor>& margin, const ErrorSettings& settings, const MapGrads& grads) const {
    // Per channel it is the upstream gradient that the terms take, else the margin.
    const bool per_channel = settings.over == kChannel;
    const A scale = static_cast<A>(settings.scale);
    Channels<A> channels;
    if (per_channel) channels = {column(grad), scale};
    if (!per_channel && margin) channels = {column(*margin), A(1)};
    dispatch_kind<A>(settings.kind, settings.boundary, per_channel, [&](const auto& make) {
      write_slopes(MapPair(student, teacher), make, channels, per_channel ? Column{} : column(grad),
                   per_channel ? A(1) : scale, grads);
    });
  }

  template <class A>
  void normalized(const Tensor& student, const Tensor& teacher, int64_t power, A* stats, A* loss) const {
    const MapPair maps(student, teacher);
    power == 1 ? normalized_error<A, 1>(device, student, maps, stats, loss)
               : normalized_error<A, 2>(device, student, maps, stats, loss);
  }

  template <class A>
  void normalized_backward(const Column& grad, const Tensor& student, const Tensor& teacher, const A* stats,
                           int64_t power, const MapGrads& grads) const {
    const MapPair maps(student, teacher);
    const A factor = static_cast<A>(1 / elements_of(maps));
    const auto run = [&](const auto& make) { write_slopes(maps, make, Channels<A>{}, grad, factor, grads); };
    power == 1 ? run(OfSample<A, 1, true>{stats, maps.batch}) : run(OfSample<A, 2, true>{stats, maps.batch});
  }

  template <class A>
  void pyramid(const Tensor& student, const Tensor& teacher, A* loss) const {
    const PyramidMaps maps(student, teacher);
    const int64_t blocks = maps.batch * maps.tiles();
    DeviceMemory<double> losses(student, blocks);
    run_pyramid<A, false>(device, maps, losses.data(), {}, {}, {});
    sum_of(device, student, kdfast::Partial{losses.data()}, blocks, loss);
  }

  template <class A>
  void pyramid_backward(const Column& grad, const Tensor& student, const Tensor& teacher, const MapGrads& grads) const {
    const Order order(student);
    run_pyramid<A, true>(device, PyramidMaps(student, teacher), nullptr, grad, grads.to_student.rows(order),
                         grads.to_teacher.rows(order));
  }

 private:
  template <class A, class Make>
  void write_slopes(const MapPair& maps, const Make& make, const Channels<A>& channels, const Column& grad, A factor,
                    const MapGrads& grads) const {
    if (maps.blocks() == 0) return;
    launch(device, {maps.blocks(), kBlock}, slope_kernel<A, Make>, maps, make, channels, grad, factor,
           grads.to_student.rows(maps.order), grads.to_teacher.rows(maps.order));
  }
};

}  // namespace
}  // namespace feature
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) { kdfast::feature::register_ops<kdfast::feature::Cuda>(m); }
