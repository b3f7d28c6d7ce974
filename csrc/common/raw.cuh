// Elements are loaded as they lie in memory and converted later, so that the loads of several rows are in flight at
// once: a conversion waits for its load, and what follows it in a branch on the dtype waits with it.
#pragma once

#include "common/launch.cuh"
#include "common/vector_math.h"

namespace kdfast {

template <class T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// x, of which the compiler knows nothing: what is computed from it inside a rare branch stays there, instead of holding
// registers throughout the loop.
__device__ inline int64_t opaque(int64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Where an element lies, if it exists.
struct Element {
  bool inside;
  int64_t offset;
};

// kCount elements of one dtype, for sums in float. With kPairs those of 16 bits are two to a word, as 16-byte loads
// give them. One array holds every dtype: with one for each, registers would be copied where branches meet, which
// waits.
template <class A, int kCount, bool kPairs = false>
struct Raw {
  uint32_t words[kCount];

  // Neighbours in memory; `from` is a multiple of 16 bytes, and no double.
  __device__ void load(const void* from, ScalarType dtype) {
    static_assert(kPairs && kCount == 8, "16 bytes of a 16-bit type");
    const uint4* packs = static_cast<const uint4*>(from);
    load_four(packs, 0);
    if (dtype == ScalarType::Float) {
      load_four(packs + 1, 4);
    } else {
      clear_rest();
    }
  }

  // The elements at place(0), ...; place is called once for each, in order. Where there is none: 0.
  template <class F>
  __device__ void gather(const void* data, ScalarType dtype, F&& place) {
    const auto same = [](uint32_t x) { return x; };
    switch (dtype) {
      case ScalarType::Float: return gather_as(static_cast<const uint32_t*>(data), place, same, words);
      case ScalarType::Double:
        return gather_as(
            static_cast<const double*>(data), place, [](double x) { return bits<uint32_t>(static_cast<float>(x)); },
            words);
      default: break;
    }
    if constexpr (kPairs) {
      uint32_t each[kCount];
      gather_as(static_cast<const uint16_t*>(data), place, same, each);
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) words[i] = each[2 * i] | each[2 * i + 1] << 16;
      clear_rest();
    } else {
      gather_as(static_cast<const uint16_t*>(data), place, same, words);
    }
  }

  __device__ void convert(ScalarType dtype, A (&to)[kCount]) const {
    switch (dtype) {
      case ScalarType::Half: return convert_halves<Half>(to);
      case ScalarType::BFloat16: return convert_halves<BFloat16>(to);
      default:
#pragma unroll
        for (int i = 0; i < kCount; ++i) to[i] = bits<float>(words[i]);
    }
  }

 private:
  // For what pairs leave unused: without a value the compiler may give it that of another load, and wait for it.
  __device__ void clear_rest() {
#pragma unroll
    for (int i = kCount / 2; i < kCount; ++i) words[i] = 0;
  }

  __device__ void load_four(const uint4* pack, int first) {
    const uint4 x = *pack;
    words[first] = x.x;
    words[first + 1] = x.y;
    words[first + 2] = x.z;
    words[first + 3] = x.w;
  }

  template <class T, class F, class G>
  __device__ static void gather_as(const T* data, F& place, const G& word_of, uint32_t (&to)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Element p = place(i);
      to[i] = p.inside ? word_of(data[p.offset]) : 0;
    }
  }

  template <class T>
  __device__ void convert_halves(A (&to)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t word = kPairs ? words[i / 2] >> 16 * (i % 2) : words[i];
      to[i] = static_cast<A>(bits<T>(static_cast<uint16_t>(word)));
    }
  }
};

// For sums in double, where registers are few: converted at once.
template <int kCount, bool kPairs>
struct Raw<double, kCount, kPairs> {
  double values[kCount];

  __device__ void load(const void* from, ScalarType dtype) {
    dispatch_float(dtype, [&](auto tag) {
      using T = decltype(tag);
      const Packed<T>* packs = static_cast<const Packed<T>*>(from);
#pragma unroll
      for (int i = 0; i < kCount / Packed<T>::kSize; ++i) {
        const Packed<T> pack = packs[i];
#pragma unroll
        for (int j = 0; j < Packed<T>::kSize; ++j) {
          values[i * Packed<T>::kSize + j] = static_cast<double>(pack.x[j]);
        }
      }
    });
  }

  template <class F>
  __device__ void gather(const void* data, ScalarType dtype, F&& place) {
    dispatch_float(dtype, [&](auto tag) {
      using T = decltype(tag);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Element p = place(i);
        values[i] = p.inside ? static_cast<double>(static_cast<const T*>(data)[p.offset]) : 0.0;
      }
    });
  }

  __device__ void convert(ScalarType, double (&to)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = values[i];
  }
};

}  // namespace kdfast
