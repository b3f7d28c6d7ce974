// Stands in for the CUDA runtime when a .cu source is compiled by a C++ compiler with -DKD_SIMT: every CUDA thread is a
// fiber that runs until a barrier or a warp collective. A scheduler resumes runnable fibers in random order, so that a
// missing barrier shows, and reports a block in which nothing can run.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class Wait { kNothing, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Wait wait = Wait::kNothing;
  uint64_t slot = 0;  // what the lane offers to its warp
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;
};

// What a shared array is called, and by its address, which one it is.
struct Shared {
  const char* name;
};

// Shared memory of the running block. It starts as NaN: bits that are all 1 are one in every floating type.
struct SharedMemory {
  std::map<const Shared*, std::vector<char>> arrays;
  std::vector<char> dynamic;
};

inline SharedMemory shared_memory;

inline void* shared(const Shared& array, size_t bytes) {
  return shared_memory.arrays.try_emplace(&array, bytes, char(0xff)).first->second.data();
}

inline void* dynamic_shared() { return shared_memory.dynamic.data(); }

inline Block* block = nullptr;
inline dim3 block_index, block_size, grid_size;

struct ThreadIndex {
  unsigned y = 0, z = 0;
  struct X {
    operator unsigned() const { return block->current; }
  } x;
};

inline void yield(Wait wait) {
  Fiber& fiber = block->fibers[block->current];
  fiber.wait = wait;
  swapcontext(&fiber.context, &block->scheduler);
}

inline void enter() {
  (*block->body)();
  yield(Wait::kDone);
}

// Fibers [begin, end) that all wait for `wait` (or are done) may go on; true if any does.
inline bool release(unsigned begin, unsigned end, Wait wait) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    const Wait w = block->fibers[i].wait;
    if (w != wait && w != Wait::kDone) return false;
    any |= w == wait;
  }
  for (unsigned i = begin; any && i < end; ++i) {
    if (block->fibers[i].wait == wait) block->fibers[i].wait = Wait::kNothing;
  }
  return any;
}

inline void run_block(unsigned threads, const std::function<void()>& body, std::mt19937& random) {
  block->body = &body;
  for (Fiber& fiber : block->fibers) {
    fiber.wait = Wait::kNothing;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    unsigned done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      if (block->fibers[i].wait == Wait::kNothing) ready.push_back(i);
      done += block->fibers[i].wait == Wait::kDone;
    }
    if (done == threads) return;
    std::shuffle(ready.begin(), ready.end(), random);
    for (unsigned i : ready) {
      block->current = i;
      swapcontext(&block->scheduler, &block->fibers[i].context);
    }
    bool released = false;
    for (unsigned i = 0; i < threads; i += kWarp) released |= release(i, std::min(i + kWarp, threads), Wait::kWarp);
    if (!released && ready.empty() && !release(0, threads, Wait::kBlock)) {
      throw std::runtime_error("simt: deadlock: threads of one block wait at different barriers or collectives");
    }
  }
}

// Runs body() once for every thread of every block.
inline void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  const char* seed = std::getenv("KDFAST_SIMT_SEED");
  std::mt19937 random(seed ? std::strtoul(seed, nullptr, 10) : 0);
  Block state;
  state.fibers.resize(threads.x);
  block = &state;
  block_size = threads;
  grid_size = grid;
  for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
    shared_memory = {{}, std::vector<char>(shared_bytes, char(0xff))};
    run_block(threads.x, body, random);
  }
  block = nullptr;
}

// Every live lane of the warp offers `value`; the result is what lane `source` offered.
template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned base = block->current / kWarp * kWarp;
  memcpy(&block->fibers[block->current].slot, &value, sizeof(T));
  yield(Wait::kWarp);
  memcpy(&value, &block->fibers[base + source].slot, sizeof(T));
  yield(Wait::kWarp);
  return value;
}

}  // namespace simt

inline const simt::ThreadIndex threadIdx;
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

inline void __syncthreads() { simt::yield(simt::Wait::kBlock); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return simt::exchange(value, (threadIdx.x % simt::kWarp) ^ lanes);
}
