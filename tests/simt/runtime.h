// What the two halves of the runtime, scheduler.cpp and memory.cpp, tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// ---- scheduler.cpp
constexpr int kNone = -1;

int running();                        // index of the running thread in its block, or kNone outside kernels
bool on_stack(const void* address);   // of a thread
std::string where(const void* code);  // function, file and line of an address in this library

// ---- memory.cpp
void start_launch(size_t shared_bytes);
void start_block();
void order_block();                              // what was accessed before comes before what will be
void order_warp(unsigned warp, uint32_t lanes);  // the same among these lanes

}  // namespace simt
