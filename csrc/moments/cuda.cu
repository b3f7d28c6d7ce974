#include "common/map_step.cuh"
#include "common/sum.cuh"
#include "moments/host.h"

namespace kdfast {
namespace moments {
namespace {

constexpr int64_t kRounds = 16;                 // steps of kStep values that a thread takes
constexpr int64_t kPiece = 4 * kBlock * kStep;  // elements of a sample whose slopes one block writes

// ---- forward

// What a thread has seen of a channel. Values are counted from one of the first, so that A holds their spread: from the
// smallest, which is no outlier that would cost the others their digits.
template <class A>
struct Running {
  Part<A> part{0, 0, 0};
  A shift = 0;

  // The first n of the values.
  __device__ void add(const A (&values)[kStep], int n) {
    if (n == 0) return;
    if (part.count == A(0)) {
      shift = infinity<A>();
#pragma unroll
      for (int i = 0; i < kStep; ++i) shift = i < n && std::abs(values[i]) < std::abs(shift) ? values[i] : shift;
      if (!Part<A>::is_finite(shift)) shift = 0;
    }
    const A count = static_cast<A>(n);
    A sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += i < n ? values[i] - shift : A(0);
    const A mean = divide(sum, count);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const A d = i < n ? values[i] - shift - mean : A(0);
      squares += d * d;
    }
    part.add({count, mean, squares});
  }
  __device__ Part<double> total() const { return {part.count, static_cast<double>(shift) + part.mean, part.squares}; }
};

// A block measures kBlock * kRounds steps of one channel, kStep positions each; or (kByChannel) each lane its own of
// 32 channels, a warp kStep positions at once. What belongs to one channel lies `kApart` threads apart.
template <bool kByChannel>
struct Tile {
  static constexpr int kApart = kByChannel ? kWarp : 1;  // also the number of channels
  static constexpr int kPerRound = kBlock / kApart;
  static constexpr int64_t kSteps = kPerRound * kRounds;

  static int64_t tiles(int64_t channels) { return blocks_for(channels, kApart); }
  static int64_t steps(const Order& order, int64_t batch) {
    return kByChannel ? blocks_for(batch * order.outer, kStep) : batch * blocks_for(order.inner, kStep);
  }
};

// The values of a step, of which the first n exist; -> n.
template <bool kByChannel, class A>
__device__ int read_values(const Map& x, const Order& order, int64_t batch, int64_t channel, int64_t step,
                           A (&values)[kStep]) {
  int64_t n;
  if (kByChannel) {
    const int64_t row = step * kStep;
    int64_t b = row / order.outer, position = row % order.outer;
    n = batch * order.outer - row;
    Raw<A, kStep> raw;
    raw.gather(x.data, x.dtype, [&](int i) {
      const Element place{i < n, b * x.sample + position * x.outer + channel * x.inner};
      if (++position == order.outer) position = 0, ++b;
      return place;
    });
    raw.convert(x.dtype, values);
  } else {
    const int64_t steps = (order.inner + kStep - 1) / kStep, b = step / steps, at = step % steps * kStep;
    n = b < batch ? order.inner - at : 0;
    if (n > 0) load<A>(x, order, b, channel * order.inner + at).convert(A(0), values);
  }
  return n < 0 ? 0 : n < kStep ? static_cast<int>(n) : kStep;
}

// What is summed over a channel.
template <class A>
struct Moments {
  using Sums = Part<double>;
  Map x;

  struct Channel {
    Running<A> running;

    template <bool kByChannel>
    __device__ void add(const Moments& of, const Order& order, int64_t batch, int64_t channel, int64_t step) {
      A values[kStep] = {};
      const int n = read_values<kByChannel>(of.x, order, batch, channel, step, values);
      running.add(values, n);
    }
    __device__ Sums total() const { return running.total(); }
  };
  __device__ Channel begin(int64_t, int64_t) const { return {}; }
};

template <class A>
struct SquaredGaps {
  using Sums = Sum;
  Map student, teacher;
  const A* statistics;

  struct Channel {
    Standard<A> of_s, of_t;
    A sum = 0;

    template <bool kByChannel>
    __device__ void add(const SquaredGaps& of, const Order& order, int64_t batch, int64_t channel, int64_t step) {
      A s[kStep] = {}, t[kStep] = {};
      read_values<kByChannel>(of.student, order, batch, channel, step, s);
      const int n = read_values<kByChannel>(of.teacher, order, batch, channel, step, t);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const A gap = i < n ? of_s.gap(s[i], t[i], of_t) : A(0);
        sum += gap * gap;
      }
    }
    __device__ Sums total() const { return {static_cast<double>(sum)}; }
  };
  __device__ Channel begin(int64_t channel, int64_t channels) const {
    return {standard(statistics + channel, channels),
            standard(statistics + kStatistics * channels + channel, channels)};
  }
};

// Adds up the parts of each channel in a fixed order; thread c has that of channel c.
template <int kApart, class P>
__device__ void merge(P* parts, const P& own) {
  parts[threadIdx.x] = own;
  for (int half = kBlock / 2; half >= kApart; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x].add(parts[threadIdx.x + half]);
  }
}

// out [pieces][channels]
template <class A, bool kByChannel, class Of>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(4))
    part_kernel(Of of, Order order, int64_t batch, int64_t tiles, typename Of::Sums* out) {
  using T = Tile<kByChannel>;
  const int64_t piece = blockIdx.x / tiles, channels = kByChannel ? order.inner : order.outer;
  const int64_t channel = blockIdx.x % tiles * T::kApart + threadIdx.x % T::kApart;
  auto own = of.begin(channel < channels ? channel : 0, channels);
  for (int64_t round = 0; round < kRounds && channel < channels; ++round) {
    const int64_t step = piece * T::kSteps + round * T::kPerRound + threadIdx.x / T::kApart;
    own.template add<kByChannel>(of, order, batch, channel, step);
  }
  KD_SHARED(typename Of::Sums, parts, kBlock);
  merge<T::kApart>(parts, own.total());
  if (threadIdx.x < T::kApart && channel < channels) out[piece * channels + channel] = parts[threadIdx.x];
}

// finish(channel, its sums) for 32 channels, whose parts are neighbours.
template <class Sums, class Finish>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    channel_kernel(const Sums* of_pieces, int64_t pieces, int64_t channels, Finish finish) {
  const int64_t channel = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  Sums own{};
  for (int64_t piece = threadIdx.x / kWarp; piece < pieces && channel < channels; piece += kWarps) {
    own.add(of_pieces[piece * channels + channel]);
  }
  KD_SHARED(Sums, parts, kBlock);
  merge<kWarp>(parts, own);
  if (threadIdx.x < kWarp && channel < channels) finish(channel, parts[threadIdx.x]);
}

template <class A, bool kByChannel, class Of, class Finish>
void sum_channels(const OnDevice& device, const Tensor& like, const Order& order, const Of& of, const Finish& finish) {
  using T = Tile<kByChannel>;
  using Sums = typename Of::Sums;
  const int64_t batch = like.size(0), channels = like.size(1), tiles = T::tiles(channels);
  const int64_t pieces = blocks_for(T::steps(order, batch), T::kSteps);
  Tensor memory = empty(like, ScalarType::Double, {pieces, channels, sizeof(Sums) / sizeof(double)});
  Sums* parts = static_cast<Sums*>(memory.data_ptr());
  if (pieces > 0) {
    launch(device, {pieces * tiles, kBlock}, part_kernel<A, kByChannel, Of>, of, order, batch, tiles, parts);
  }
  launch(device, {blocks_for(channels, kWarp), kBlock}, channel_kernel<Sums, Finish>, parts, pieces, channels, finish);
}

template <class A, class Of, class Finish>
void sum_channels(const OnDevice& device, const Tensor& like, const Order& order, const Of& of, const Finish& finish) {
  order.by_channel ? sum_channels<A, true>(device, like, order, of, finish)
                   : sum_channels<A, false>(device, like, order, of, finish);
}

template <class A>
struct StoreMoments {
  A* out;  // [2][channels]
  int64_t channels;

  __device__ void operator()(int64_t channel, const Part<double>& part) const {
    out[channel] = static_cast<A>(part.mean);
    out[channels + channel] = static_cast<A>(part.variance());
  }
};

template <class A>
struct StoreStandard {
  A* statistics;
  int64_t channels;
  double epsilon;
  bool of_teacher;

  __device__ void operator()(int64_t channel, const Part<double>& part) const {
    store_standard(part, epsilon, channels, of_teacher, statistics + channel);
  }
};

template <class A>
struct StoreSlopes {
  A* statistics;
  int64_t channels;
  double scale;  // 1 / (n - 1)
  double* sums;

  __device__ void operator()(int64_t channel, const Sum& sum) const {
    sums[channel] = sum.value;
    store_slopes(static_cast<A>(scale * sum.value), channels, statistics + channel);
  }
};

struct Scaled {
  const double* sums;
  double scale;

  __device__ double operator()(int64_t i) const { return scale * sums[i]; }
};

// ---- backward

// One number for each of the elements [at, at + kStep) of a sample, from a row of values of channels.
template <class A>
__device__ void read_channels(const Matrix& values, int64_t row, const Order& order, int64_t at, A (&to)[kStep]) {
  int64_t outer = at / order.inner, inner = at % order.inner;
  if (order.by_channel && inner + kStep <= order.inner) return read(values, row, inner, order.inner, A(0), to);
  const bool same = !order.by_channel && inner + kStep <= order.inner;
  if (same) to[0] = read_one<A>(values, row, outer);
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    if (same) {
      to[i] = to[0];
      continue;
    }
    to[i] = outer < order.outer ? read_one<A>(values, row, order.by_channel ? inner : outer) : A(0);
    if (++inner == order.inner) inner = 0, ++outer;
  }
}

// out [batch, size]
template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    slope_kernel(Map x, Order order, int64_t pieces, Matrix moments, Matrix grad, A share, Matrix out) {
  const int64_t b = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece, size = order.size();
  const int64_t end = begin + kPiece < size ? begin + kPiece : size;
  for (int64_t at = begin + threadIdx.x * kStep; at < end; at += kBlock * kStep) {
    A values[kStep], mean[kStep], of_mean[kStep], of_variance[kStep];
    const Step<A> step = load<A>(x, order, b, at);
    read_channels(moments, 0, order, at, mean);
    read_channels(grad, 0, order, at, of_mean);
    read_channels(grad, 1, order, at, of_variance);
    step.convert(A(0), values);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      values[i] = Slope<A>{mean[i], share * of_mean[i], A(2) * share * of_variance[i]}(values[i]);
    }
    write(out, b, at, size, values);
  }
}

// Gradients [batch, size] of the standardised error, of which either may be absent. statistics [2 kStatistics,
// channels]
template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2))
    standard_slope_kernel(Map student, Map teacher, Order order, int64_t pieces, Matrix statistics, Column grad,
                          A factor, Matrix to_s, Matrix to_t) {
  const int64_t b = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece, size = order.size();
  const int64_t end = begin + kPiece < size ? begin + kPiece : size;
  factor *= read<A>(grad, 0);
  for (int64_t at = begin + threadIdx.x * kStep; at < end; at += kBlock * kStep) {
    A s[kStep], t[kStep], number[kStep];
    read(student, teacher, order, b, at, s, t);
    for (int row = 0; row < 2; ++row) {  // the mean and its rest
      read_channels(statistics, row, order, at, number);
#pragma unroll
      for (int i = 0; i < kStep; ++i) s[i] -= number[i];
      read_channels(statistics, kStatistics + row, order, at, number);
#pragma unroll
      for (int i = 0; i < kStep; ++i) t[i] -= number[i];
    }
    const auto write_side = [&](const Matrix& to, const A(&own)[kStep], const A(&other)[kStep], int64_t first) {
      if (!to.data) return;
      A slopes[kStep];
      read_channels(statistics, first + 3, order, at, number);
#pragma unroll
      for (int i = 0; i < kStep; ++i) slopes[i] = own[i] - other[i] * number[i];
      read_channels(statistics, first + 4, order, at, number);
#pragma unroll
      for (int i = 0; i < kStep; ++i) slopes[i] -= number[i] * own[i];
      read_channels(statistics, first + 2, order, at, number);
#pragma unroll
      for (int i = 0; i < kStep; ++i) slopes[i] *= number[i] * (factor * number[i]);
      write(to, b, at, size, slopes);
    };
    write_side(to_s, s, t, 0);
    write_side(to_t, t, s, kStatistics);
  }
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void moments(const Tensor& x, const Order& order, A* out) const {
    sum_channels<A>(device, x, order, Moments<A>{map(x, order)}, StoreMoments<A>{out, x.size(1)});
  }

  template <class A>
  void backward(const Matrix& grad, const Tensor& x, const Order& order, const Matrix& moments,
                const Tensor& out) const {
    const int64_t batch = x.size(0), pieces = blocks_for(order.size(), kPiece);
    if (pieces == 0) return;
    const A share = static_cast<A>(1.0 / (static_cast<double>(batch) * static_cast<double>(positions(x))));
    launch(device, {batch * pieces, kBlock}, slope_kernel<A>, map(x, order), order, pieces, moments, grad, share,
           Matrix{out.data_ptr(), out.scalar_type(), order.size(), 1});
  }

  // statistics [2, kStatistics, channels]
  template <class A>
  void error(const Tensor& student, const Tensor& teacher, const Order& order, double epsilon, A* statistics,
             A* loss) const {
    const int64_t channels = student.size(1);
    const double n = static_cast<double>(student.size(0)) * static_cast<double>(positions(student));
    const Map s = map(student, order), t = map(teacher, order);
    Tensor memory = empty(student, ScalarType::Double, {channels});
    double* sums = static_cast<double*>(memory.data_ptr());
    sum_channels<A>(device, student, order, Moments<A>{s}, StoreStandard<A>{statistics, channels, epsilon, false});
    sum_channels<A>(device, student, order, Moments<A>{t}, StoreStandard<A>{statistics, channels, epsilon, true});
    sum_channels<A>(device, student, order, SquaredGaps<A>{s, t, statistics},
                    StoreSlopes<A>{statistics, channels, 1 / (n - 1), sums});
    sum_of(device, student, Scaled{sums, n > 0 ? 1 / (2 * n * static_cast<double>(channels)) : 0}, channels, loss);
  }

  template <class A>
  void error_backward(const Column& grad, const Tensor& student, const Tensor& teacher, const Order& order,
                      const A* statistics, const MapGrad& to_student, const MapGrad& to_teacher) const {
    const int64_t batch = student.size(0), pieces = blocks_for(order.size(), kPiece);
    const A factor = static_cast<A>(1.0 / (static_cast<double>(batch) * static_cast<double>(order.size())));
    launch(device, {batch * pieces, kBlock}, standard_slope_kernel<A>, map(student, order), map(teacher, order), order,
           pieces, Matrix{const_cast<A*>(statistics), kDtype<A>, student.size(1), 1}, grad, factor,
           to_student.rows(order), to_teacher.rows(order));
  }
};

}  // namespace
}  // namespace moments
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) { kdfast::moments::register_ops<kdfast::moments::Cuda>(m); }
