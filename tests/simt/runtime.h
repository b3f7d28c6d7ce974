// What the two halves of the runtime, scheduler.cpp and memory.cpp, tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// ---- scheduler.cpp
constexpr int kNone = -1;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10;

extern int current;                   // index of the running thread in its block, or kNone outside kernels
extern char* stacks;                  // of all threads
std::string where(const void* code);  // function, file and line of an address in this library

inline bool on_stack(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(stacks) < kMaxThreads * kStack;
}

// ---- memory.cpp
void start_launch(size_t shared_bytes);
void start_block();
void order_block();                              // what was accessed before comes before what will be
void order_warp(unsigned warp, uint32_t lanes);  // the same among these lanes

}  // namespace simt
