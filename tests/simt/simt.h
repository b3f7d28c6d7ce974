// The runtime that stands in for a GPU: what launchers and device code call. It is compiled on its own, so that kernels
// may be compiled with every memory access announced to it (memory.cpp) and it need not be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "vector_types.h"

namespace simt {

constexpr unsigned kWarp = 32;

// A place in the source. As a default argument, `here()` is where the function was called.
struct Place {
  const char* file;
  int line;
};

constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// What the lanes of a warp told each other; bit i of `present` is set where lane i took part.
struct Lanes {
  uint32_t present;
  uint64_t value[kWarp];
};

// One declaration of a shared array.
struct Shared {
  const char* name;
};

// Runs thread() for every thread of every block; `kernel` is for messages.
void run(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel, const std::function<void()>& thread);

// Ends the launch: run() throws, with this message and where the kernel was.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_absent(const char* what, int source);  // a lane that takes no part in the collective `what`

// The same all life long, since each thread has a stack of its own.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

void block_barrier(Place place);
// Waits for the lanes of `mask`, which must call the same `what`.
const Lanes& collective(const char* what, uint32_t mask, uint64_t offer, Place place);
// The same, and what these lanes wrote before is seen by all of them.
void warp_barrier(uint32_t mask, Place place);
void fence();

void* shared(const Shared& array, size_t bytes);
void* dynamic_shared();

// An atomic operation is one load and one store: no other thread runs in between.
void atomic_load(const void* from, void* to, size_t bytes);
void atomic_store(void* to, const void* from, size_t bytes);

}  // namespace simt
