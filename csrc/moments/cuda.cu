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

// Adds up the parts of each channel in a fixed order; thread c has that of channel c.
template <int kApart>
__device__ void merge(Part<double>* parts, const Part<double>& own) {
  parts[threadIdx.x] = own;
  for (int half = kBlock / 2; half >= kApart; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x].add(parts[threadIdx.x + half]);
  }
}

// out [pieces][channels]
template <class A, bool kByChannel>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(4))
    part_kernel(Map x, Order order, int64_t batch, int64_t tiles, Part<double>* out) {
  using T = Tile<kByChannel>;
  const int64_t piece = blockIdx.x / tiles, channels = kByChannel ? order.inner : order.outer;
  const int64_t channel = blockIdx.x % tiles * T::kApart + threadIdx.x % T::kApart;
  const int64_t steps_of_row = (order.inner + kStep - 1) / kStep, rows = batch * order.outer;
  Running<A> running;
  for (int64_t round = 0; round < kRounds && channel < channels; ++round) {
    const int64_t step = piece * T::kSteps + round * T::kPerRound + threadIdx.x / T::kApart;
    A values[kStep] = {};
    int64_t n;
    if (kByChannel) {
      const int64_t row = step * kStep;
      int64_t b = row / order.outer, position = row % order.outer;
      n = rows - row;
      Raw<A, kStep> raw;
      raw.gather(x.data, x.dtype, [&](int i) {
        const Element place{i < n, b * x.sample + position * x.outer + channel * x.inner};
        if (++position == order.outer) position = 0, ++b;
        return place;
      });
      raw.convert(x.dtype, values);
    } else {
      const int64_t b = step / steps_of_row, at = step % steps_of_row * kStep;
      n = b < batch ? order.inner - at : 0;
      if (n > 0) load<A>(x, order, b, channel * order.inner + at).convert(A(0), values);
    }
    running.add(values, n < 0 ? 0 : n < kStep ? static_cast<int>(n) : kStep);
  }
  KD_SHARED(Part<double>, parts, kBlock);
  merge<T::kApart>(parts, running.total());
  if (threadIdx.x < T::kApart && channel < channels) out[piece * channels + channel] = parts[threadIdx.x];
}

// Of 32 channels, whose parts are neighbours. out [2][channels]
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    moments_kernel(const Part<double>* of_pieces, int64_t pieces, int64_t channels, A* out) {
  const int64_t channel = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  Part<double> own{0, 0, 0};
  for (int64_t piece = threadIdx.x / kWarp; piece < pieces && channel < channels; piece += kWarps) {
    own.add(of_pieces[piece * channels + channel]);
  }
  KD_SHARED(Part<double>, parts, kBlock);
  merge<kWarp>(parts, own);
  if (threadIdx.x >= kWarp || channel >= channels) return;
  out[channel] = static_cast<A>(parts[threadIdx.x].mean);
  out[channels + channel] = static_cast<A>(parts[threadIdx.x].variance());
}

template <class A, bool kByChannel>
void measure(const OnDevice& device, const Tensor& x, const Order& order, A* out) {
  using T = Tile<kByChannel>;
  const int64_t batch = x.size(0), channels = x.size(1), tiles = T::tiles(channels);
  const int64_t pieces = blocks_for(T::steps(order, batch), T::kSteps);
  Tensor memory = empty(x, ScalarType::Double, {pieces, channels, sizeof(Part<double>) / sizeof(double)});
  Part<double>* parts = static_cast<Part<double>*>(memory.data_ptr());
  if (pieces > 0) {
    launch(device, {pieces * tiles, kBlock}, part_kernel<A, kByChannel>, map(x, order), order, batch, tiles, parts);
  }
  launch(device, {blocks_for(channels, kWarp), kBlock}, moments_kernel<A>, parts, pieces, channels, out);
}

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

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void moments(const Tensor& x, const Order& order, A* out) const {
    order.by_channel ? measure<A, true>(device, x, order, out) : measure<A, false>(device, x, order, out);
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
};

}  // namespace
}  // namespace moments
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) { kdfast::moments::register_ops<kdfast::moments::Cuda>(m); }
