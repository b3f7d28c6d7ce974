// Sums over the columns of two matrices, sum_k term(x_ik, y_jk) for all pairs of rows, as a product of matrices is one.
//
// A block has a tile of kSide x kSide sums, a thread kPer x kPer of them. kDepth columns of both matrices are in shared
// memory, column after column, while the next ones are on their way into registers. Where the tiles alone would leave
// most of a GPU idle, the columns are cut into pieces, whose sums are added in a fixed order: see Split.
#pragma once

#include "common/group.cuh"
#include "common/host.h"

namespace kdfast {

// ---- matrices
// A batch of matrices [count, rows, cols] of any type and strides; a matrix is a batch of one.
struct Batch {
  void* data;
  ScalarType dtype;
  int64_t count, rows, cols, batch_stride, row_stride, col_stride;

  explicit Batch(const Tensor& x)
      : data(x.data_ptr()),
        dtype(x.scalar_type()),
        count(x.dim() == 3 ? x.size(0) : 1),
        rows(x.size(x.dim() - 2)),
        cols(x.size(x.dim() - 1)),
        batch_stride(x.dim() == 3 ? x.stride(0) : 0),
        row_stride(x.stride(x.dim() - 2)),
        col_stride(x.stride(x.dim() - 1)) {}

  template <class A>
  __device__ A get(int64_t z, int64_t i, int64_t j) const {
    return read_one<A>(data, dtype, z * batch_stride + i * row_stride + j * col_stride);
  }

  template <class A>
  __device__ void put(int64_t z, int64_t i, int64_t j, A value) const {
    write_one(Matrix{data, dtype, 1, 0}, z * batch_stride + i * row_stride + j * col_stride, 0, value);
  }
};

static __global__ void convert_kernel(Batch x, int64_t n, Batch to) {
  const int64_t at = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= n) return;
  const int64_t z = at / (x.rows * x.cols), i = at / x.cols % x.rows, j = at % x.cols;
  to.put(z, i, j, x.get<double>(z, i, j));
}

inline void convert(const OnDevice& device, const Tensor& x, const Tensor& to) {
  const int64_t n = x.numel();
  if (n > 0) launch(device, {blocks_for(n, kBlock), kBlock}, convert_kernel, Batch(x), n, Batch(to));
}

// A batch of matrices of type T, one of whose last two strides is 1. `packed`: 16 bytes along that axis can be read at
// once.
template <class T>
struct Operand {
  const T* data;
  int64_t count, rows, cols, batch_stride, row_stride, col_stride;
  bool packed;

  explicit Operand(const Batch& x)
      : data(static_cast<const T*>(x.data)),
        count(x.count),
        rows(x.rows),
        cols(x.cols),
        batch_stride(x.batch_stride),
        row_stride(x.row_stride),
        col_stride(x.col_stride),
        packed((batch_stride | (col_stride == 1 ? row_stride : col_stride)) % int64_t(16 / sizeof(T)) == 0 &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0) {}

  KD_HD Operand transposed() const {
    Operand t = *this;
    t.rows = cols;
    t.cols = rows;
    t.row_stride = col_stride;
    t.col_stride = row_stride;
    return t;
  }
};

template <class T>
constexpr ScalarType kScalarType = torch::headeronly::CppTypeToScalarType<T>::value;

// x as an operand: itself, or a copy, which `memory` holds.
template <class T>
Operand<T> operand(const OnDevice& device, const Tensor& x, std::optional<Tensor>& memory) {
  const Batch own(x);
  if (own.dtype == kScalarType<T> && (own.row_stride == 1 || own.col_stride == 1)) return Operand<T>(own);
  memory = empty(x, kScalarType<T>, {own.count, own.rows, own.cols});
  convert(device, x, *memory);
  return Operand<T>(Batch(*memory));
}

// f(T{}) with the type in which rows are read, or sums written: `dtype` if it is less precise than the sums, else A.
template <class A, class F>
void dispatch_narrow(ScalarType dtype, const F& f) {
  if constexpr (sizeof(A) == 4) {
    if (dtype == ScalarType::Half) return f(Half{});
    if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  }
  f(A{});
}

// ---- tiles
constexpr int kAcross = 16;  // threads of a block along either side of a tile
constexpr int kPack = 4;     // neighbours among a thread's rows: it reads them at once

template <class T>
struct alignas(16) Neighbours {
  T x[kPack];
};

template <class A, int kPer>
struct Tile {
  static constexpr int kSide = kPer * kAcross;
  static constexpr int kDepth = sizeof(A) == 8 ? 8 : 16;  // columns at a time
  static constexpr int kEach = kSide * kDepth / kBlock;   // elements of either matrix that a thread fetches
  static constexpr int kRow = kSide + kPack;              // a column in shared memory, padded against bank conflicts
  static constexpr int kColumns = kDepth * kRow;          // elements of so many columns in shared memory

  // Where the u-th row of a thread is, in the tile: packs of neighbours, so that a warp reads few addresses.
  static __device__ int at(int thread, int u) { return u / kPack * (kPack * kAcross) + thread * kPack + u % kPack; }
};

// Shared memory of a block: two halves for columns of both matrices; one is read while the other is written.
template <class A, int kPer>
struct Columns {
  static constexpr int kSize = 4 * Tile<A, kPer>::kColumns;
  Neighbours<A> x[kSize / kPack];

  __device__ A* half(int i) { return x[0].x + 2 * i * Tile<A, kPer>::kColumns; }
};

// How the sums are shared out among blocks. It depends on sizes alone, and so do the bits.
struct Split {
  bool self, large;       // pairs of one matrix: tiles below the diagonal are mirrored; tiles of 128 x 128, not 64 x 64
  int64_t pieces, depth;  // of the columns; `depth` columns each

#if defined(KD_SIMT)  // thread by thread: small matrices must take every path
  static constexpr int64_t kBlocks = 4, kLeast = 32;
#else
  static constexpr int64_t kBlocks = 264;  // two for each of 132 multiprocessors
  static constexpr int64_t kLeast = 128;   // columns of a piece
#endif

  Split(int64_t count, int64_t rows, int64_t others, int64_t cols, bool same, bool may_be_large) : self(same) {
    constexpr int64_t kStep = 16;  // a multiple of the columns at a time
    const auto tiles = [&](int64_t side) {
      const int64_t down = blocks_for(rows, side), across = blocks_for(others, side);
      return max<int64_t>(1, count * (self ? down * (down + 1) / 2 : down * across));
    };
    // Partial sums take at most four times the memory of the matrices.
    const int64_t by_memory = 4 * (rows + others) * cols / max<int64_t>(1, rows * others);
    const auto most = [&](int64_t n) {
      return max<int64_t>(1, std::min({blocks_for(kBlocks, n), blocks_for(cols, kLeast), by_memory}));
    };
    large = may_be_large && tiles(128) * most(tiles(128)) >= kBlocks;
    depth = blocks_for(blocks_for(cols, most(tiles(large ? 128 : 64))), kStep) * kStep;
    pieces = cols > 0 ? blocks_for(cols, depth) : 1;
  }
};

// What a block works on: the sums of rows from i0 and rows from j0 of matrix z, over the columns [begin, end).
struct Place {
  int64_t part, z, i0, j0, begin, end;  // part: z, counted through all pieces

  __device__ Place(int side, int64_t count, int64_t rows, int64_t others, int64_t cols, const Split& split) {
    const int64_t down = (rows + side - 1) / side, across = (others + side - 1) / side;
    part = blockIdx.x / (down * across);
    z = part % count;
    i0 = blockIdx.x / across % down * side;
    j0 = blockIdx.x % across * side;
    begin = part / count * split.depth;
    end = begin + split.depth < cols ? begin + split.depth : cols;
  }
};

// What a thread brings of a matrix into shared memory, in packs that lie along the axis of stride 1. Neighbouring
// threads have neighbouring packs.
template <class T, class A, int kPer>
class Fetch {
  using Of = Tile<A, kPer>;

 public:
  // Of the rows from row0, and the columns from `begin`.
  __device__ Fetch(const Operand<T>& x, int64_t z, int64_t row0, int64_t begin) : x_(x) {
    const int t = threadIdx.x, line = t / threads();
    first_ = t % threads() * kSize;
    const int64_t row = row0 + (along() ? line : first_), left = x.rows - row;
    next_ = x.data + z * x.batch_stride + row * x.row_stride + (begin + (along() ? first_ : line)) * x.col_stride;
    rows_ = static_cast<int>(left < 0 ? 0 : left < Of::kSide ? left : Of::kSide);
    to_ = along() ? first_ * Of::kRow + line : line * Of::kRow + first_;
    if (!along()) first_ = line;
  }

  // The next columns, of which `left` are left; zeros beyond the last row and column.
  __device__ void load(int64_t left) {
    const int64_t own = left - first_, limit = along() ? (rows_ > 0 ? own : 0) : (own > 0 ? rows_ : 0);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = i * threads() * kSize;
      if (x_.packed && at + kSize <= limit) {
        packs_[i] = *reinterpret_cast<const Pack*>(next_ + at);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e) packs_[i].x[e] = at + e < limit ? next_[at + e] : T(0);
      }
    }
    next_ += Of::kDepth * x_.col_stride;
  }

  __device__ void store(A* to) const {
    const int stride = along() ? Of::kRow : 1;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        to[to_ + (i * threads() * kSize + e) * stride] = static_cast<A>(packs_[i].x[e]);
      }
    }
  }

 private:
  static constexpr int kBytes = Of::kEach * sizeof(T) < 16 ? Of::kEach * sizeof(T) : 16;
  static constexpr int kSize = kBytes / sizeof(T), kPacks = Of::kEach / kSize;
  struct alignas(kBytes) Pack {
    T x[kSize];
  };

  __device__ bool along() const { return x_.col_stride == 1; }
  __device__ int threads() const { return (along() ? Of::kDepth : Of::kSide) / Of::kEach; }  // of a row, or a column

  const Operand<T>& x_;
  Pack packs_[kPacks];
  const T* next_;
  int rows_, first_, to_;  // rows from the thread's own; its first column; where it stores
};

// add(u, v, a, b) for a thread's pairs of rows, of as many columns as are in shared memory.
template <int kPer, class X, class A, class F>
__device__ void for_terms(const X* x, const A* y, const F& add) {
  using Of = Tile<A, kPer>;
  constexpr int kPacks = kPer / kPack, kRow = Of::kRow;
  const int a = Of::at(threadIdx.x / kAcross, 0), b = Of::at(threadIdx.x % kAcross, 0);
#pragma unroll 4
  for (int k = 0; k < Of::kDepth; ++k) {
    Neighbours<X> own[kPacks];
    Neighbours<A> other[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      own[i] = *reinterpret_cast<const Neighbours<X>*>(x + k * kRow + a + i * kPack * kAcross);
      other[i] = *reinterpret_cast<const Neighbours<A>*>(y + k * kRow + b + i * kPack * kAcross);
    }
#pragma unroll
    for (int u = 0; u < kPer; ++u) {
#pragma unroll
      for (int v = 0; v < kPer; ++v) add(u, v, own[u / kPack].x[u % kPack], other[v / kPack].x[v % kPack]);
    }
  }
}

// The same of the columns [begin, end), for the rows from i0 and from j0.
template <class A, int kPer, class X, class Y, class F>
__device__ void for_columns(const Operand<X>& x, const Operand<Y>& y, int64_t z, int64_t i0, int64_t j0, int64_t begin,
                            int64_t end, Columns<A, kPer>& shared, const F& add) {
  constexpr int kDepth = Tile<A, kPer>::kDepth;
  Fetch<X, A, kPer> next_x(x, z, i0, begin);
  Fetch<Y, A, kPer> next_y(y, z, j0, begin);
  int64_t left = end - begin;
  next_x.load(left);
  next_y.load(left);
  __syncthreads();  // what was in shared memory has been used
  for (int half = 0; left > 0; left -= kDepth, half ^= 1) {
    A *const to_x = shared.half(half), *const to_y = to_x + Tile<A, kPer>::kColumns;
    next_x.store(to_x);
    next_y.store(to_y);
    __syncthreads();
    if (left > kDepth) {
      next_x.load(left - kDepth);
      next_y.load(left - kDepth);
    }
    for_terms<kPer>(to_x, to_y, add);
  }
}

// A block's sums, in the order in which they lie in memory: f(i, j, sum) by rows and, if `mirrored`, f(j, i, sum) by
// columns. They go through shared memory, in parts that fit.
template <class A, int kPer, class F>
__device__ void for_results(const A (&sum)[kPer][kPer], const Place& place, int64_t rows, int64_t others, bool mirrored,
                            Columns<A, kPer>& shared, const F& f) {
  using Of = Tile<A, kPer>;
  constexpr int kSide = Of::kSide, kGroup = kPack * kAcross, kRows = Columns<A, kPer>::kSize / Of::kRow;
  A* const part = shared.half(0);
#pragma unroll
  for (int first = 0; first < kSide; first += kRows) {
    const int row = Of::at(threadIdx.x / kAcross, first / kGroup * kPack) - first;
    __syncthreads();  // what was in shared memory has been used
    if (row >= 0 && row < kRows) {
#pragma unroll
      for (int u = 0; u < kPack; ++u) {
#pragma unroll
        for (int v = 0; v < kPer; ++v) {
          part[(row + u) * Of::kRow + Of::at(threadIdx.x % kAcross, v)] = sum[first / kGroup * kPack + u][v];
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < kRows * kSide; e += kBlock) {
      const int64_t i = place.i0 + first + e / kSide, j = place.j0 + e % kSide;
      if (i < rows && j < others) f(i, j, part[e / kSide * Of::kRow + e % kSide]);
    }
    if (!mirrored) continue;
#pragma unroll 1
    for (int e = threadIdx.x; e < kRows * kSide; e += kBlock) {
      const int64_t i = place.i0 + first + e % kRows, j = place.j0 + e / kRows;
      if (i < rows && j < others) f(j, i, part[e % kRows * Of::kRow + e / kRows]);
    }
  }
}

// A block's sums to put(z, i, j, sum), or to `parts` [pieces, count, rows, others].
template <class A, int kPer, class Put>
__device__ void store_sums(const A (&sum)[kPer][kPer], const Place& place, int64_t rows, int64_t others,
                           const Split& split, A* parts, Columns<A, kPer>& shared, const Put& put) {
  const bool mirrored = split.self && place.i0 != place.j0 && !parts;
  for_results<A, kPer>(sum, place, rows, others, mirrored, shared, [&](int64_t i, int64_t j, A s) {
    if (parts) {
      parts[(place.part * rows + i) * others + j] = s;
    } else {
      put(place.z, i, j, s);
    }
  });
}

// The pieces of every sum added in order; of a matrix with itself each from the upper tile.
template <class A, class Put>
__global__ void add_parts_kernel(const A* parts, Split split, int64_t count, int64_t rows, int64_t others, Put put) {
  const int64_t at = int64_t(blockIdx.x) * kBlock + threadIdx.x, matrix = rows * others;
  if (at >= count * matrix) return;
  const int64_t z = at / matrix, i = at % matrix / others, j = at % others, side = split.large ? 128 : 64;
  const bool mirrored = split.self && j / side < i / side;
  const A* from = parts + z * matrix + (mirrored ? j * others + i : i * others + j);
  A sum = 0;
  for (int64_t piece = 0; piece < split.pieces; ++piece) sum += from[piece * count * matrix];
  put(z, i, j, sum);
}

// put(z, i, j, sum) of all sums. run(blocks, parts) starts the kernel that gives them to `store_sums`.
template <class A, class Put, class F>
void for_sums(const OnDevice& device, const Tensor& like, int64_t count, int64_t rows, int64_t others,
              const Split& split, const Put& put, const F& run) {
  const int64_t results = count * rows * others, side = split.large ? 128 : 64;
  if (results == 0) return;
  const bool several = split.pieces > 1;
  DeviceMemory<A> memory(like, several ? split.pieces * results : 0);
  A* const parts = several ? memory.data() : nullptr;
  run(split.pieces * count * blocks_for(rows, side) * blocks_for(others, side), parts);
  if (!several) return;
  launch(device, {blocks_for(results, kBlock), kBlock}, add_parts_kernel<A, Put>, parts, split, count, rows, others,
         put);
}

// ---- sums of two matrices
struct Product {
  template <class A>
  static __device__ A add(A sum, A a, A b) {
    return sum + a * b;
  }
};

struct SquaredDifference {
  template <class A>
  static __device__ A add(A sum, A a, A b) {
    const A difference = a - b;
    return sum + difference * difference;
  }
};

template <class A, class Term, int kPer, class X, class Y, class Put>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    sums_kernel(Operand<X> x, Operand<Y> y, Split split, A* parts, Put put) {
  const Place place(Tile<A, kPer>::kSide, x.count, x.rows, y.rows, x.cols, split);
  if (split.self && place.j0 < place.i0) return;
  using Shared = Columns<A, kPer>;
  KD_SHARED(Shared, shared, 1);
  A sum[kPer][kPer] = {};
  for_columns<A, kPer>(x, y, place.z, place.i0, place.j0, place.begin, place.end, shared[0],
                       [&](int u, int v, A a, A b) { sum[u][v] = Term::add(sum[u][v], a, b); });
  store_sums<A, kPer>(sum, place, x.rows, y.rows, split, parts, shared[0], put);
}

// put(z, i, j, sum_k Term(x_zik, y_zjk)) for all pairs of rows; `self`: x and y are the same.
template <class A, class Term, class X, class Y, class Put>
void sums_of(const OnDevice& device, const Tensor& like, const Operand<X>& x, const Operand<Y>& y, bool self,
             const Put& put) {
  constexpr bool kLarge = sizeof(A) == 4;
  const Split split(x.count, x.rows, y.rows, x.cols, self, kLarge);
  for_sums<A>(device, like, x.count, x.rows, y.rows, split, put, [&](int64_t blocks, A* parts) {
    if constexpr (kLarge) {
      if (split.large) {
        return launch(device, {blocks, kBlock}, sums_kernel<A, Term, 8, X, Y, Put>, x, y, split, parts, put);
      }
    }
    launch(device, {blocks, kBlock}, sums_kernel<A, Term, 4, X, Y, Put>, x, y, split, parts, put);
  });
}

// out [count, rows, others] = factor * sum
template <class A, class T>
struct Write {
  T* out;
  int64_t rows, others;
  Column factor;

  __device__ void operator()(int64_t z, int64_t i, int64_t j, A sum) const {
    out[(z * rows + i) * others + j] = static_cast<T>(factor.data ? read<A>(factor, 0) * sum : sum);
  }
};

// write(tensor of type T) once: `out`, or where that has another type a tensor that is then converted.
template <class T, class F>
void write_as(const OnDevice& device, const Tensor& out, const F& write) {
  if (out.scalar_type() == kScalarType<T>) return write(out);
  const Batch shape(out);
  const Tensor wide = empty(out, kScalarType<T>, {shape.count, shape.rows, shape.cols});
  write(wide);
  convert(device, wide, out);
}

}  // namespace kdfast
