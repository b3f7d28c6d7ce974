// Runs a kernel: every CUDA thread is a fiber that runs until a barrier or a warp collective. Blocks come one after
// another in random order. In a block a warp runs on while it can or, now and then, another one overtakes it; its lanes
// take turns in random order. The seed is KDFAST_SIMT_SEED.
//
// Who waits for whom is as CUDA says since Volta: a block barrier waits for all threads that have not exited; a warp
// collective for all lanes that its mask names and that have not exited, which must call the same one with the same
// mask.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "runtime.h"
#include "simt.h"

namespace simt {

// Stacks and threads are kept from launch to launch.
char* stacks = nullptr;
int current = kNone;

namespace {

constexpr size_t kMaxShared = 227 << 10;
constexpr const char* kSyncWarp = "__syncwarp";
constexpr unsigned kOvertake = 16;  // one turn in so many goes to a random warp

enum class State { kReady, kAtBarrier, kInCollective, kExited };

struct Thread {
  Fiber fiber;
  State state;
  const char* what = "";  // it waits at, and where; in a collective with whom, offering what
  Place place{"", 0};
  uint32_t mask = 0;
  uint64_t offer = 0;
  Lanes lanes;  // what it got
};

struct Launch {
  dim3 grid, size;
  const void* kernel;
  const std::function<void()>* thread;
  unsigned long seed;
  std::mt19937 random;
  unsigned block = 0;
  unsigned live = 0, at_barrier = 0;  // threads
  std::string failure;
};

std::unique_ptr<Thread[]> threads;
Launch* launch = nullptr;

unsigned warp_begin(unsigned thread) { return thread / kWarp * kWarp; }
unsigned warp_end(unsigned thread) { return std::min(warp_begin(thread) + kWarp, launch->size.x); }

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
bool same(Place a, Place b) { return a.line == b.line && same(a.file, b.file); }

// "threads 0-31 wait at __syncthreads (file:line); ..." for all that wait.
std::string who_waits() {
  std::string text;
  for (unsigned i = 0, end; i < launch->size.x; i = end) {
    const Thread& t = threads[i];
    const auto alike = [&t](const Thread& o) {
      return o.state == t.state && same(o.what, t.what) && o.mask == t.mask && same(o.place, t.place);
    };
    for (end = i + 1; end < launch->size.x && alike(threads[end]);) ++end;
    if (t.state != State::kAtBarrier && t.state != State::kInCollective) continue;
    char mask[32] = "";
    if (t.state == State::kInCollective) snprintf(mask, sizeof(mask), " of lanes %#x", t.mask);
    text += "\n  threads " + std::to_string(i) + " to " + std::to_string(end - 1) + " wait at " + t.what + mask + ", " +
            t.place.file + ":" + std::to_string(t.place.line);
  }
  return text;
}

void release_barrier() {
  if (launch->at_barrier == 0 || launch->at_barrier < launch->live) return;
  const Thread* first = nullptr;
  for (unsigned i = 0; i < launch->size.x; ++i) {
    if (threads[i].state != State::kAtBarrier) continue;
    if (first && !same(first->place, threads[i].place)) fail("the block waits at different barriers:" + who_waits());
    if (!first) first = &threads[i];
  }
  for (unsigned i = 0; i < launch->size.x; ++i) {
    if (threads[i].state == State::kAtBarrier) threads[i].state = State::kReady;
  }
  launch->at_barrier = 0;
  order_block();
}

// Lets the lanes go that wait with thread `i`, if it waits for no other.
void release_collective(unsigned i) {
  const Thread& one = threads[i];
  const unsigned begin = warp_begin(i), end = warp_end(i);
  Lanes lanes;
  lanes.present = 0;
  for (unsigned j = begin; j < end; ++j) {
    const Thread& t = threads[j];
    if (!(one.mask >> (j - begin) & 1) || t.state == State::kExited) continue;
    const bool alike = t.mask == one.mask && same(t.what, one.what);
    if (t.state == State::kInCollective && !alike && t.mask >> (i - begin) & 1) {
      fail("lanes that name each other call different collectives:" + who_waits());
    }
    if (t.state != State::kInCollective || !alike) return;
    lanes.present |= 1u << (j - begin);
    lanes.value[j - begin] = t.offer;
  }
  if (one.what == kSyncWarp) order_warp(i / kWarp, lanes.present);
  for (unsigned j = begin; j < end; ++j) {
    if (!(lanes.present >> (j - begin) & 1)) continue;
    threads[j].lanes = lanes;
    threads[j].state = State::kReady;
  }
}

void wait(State state, const char* what, Place place) {
  Thread& t = threads[current];
  t.state = state;
  t.what = what;
  t.place = place;
  if (state == State::kAtBarrier) {
    ++launch->at_barrier;
    release_barrier();
  } else {
    release_collective(current);
  }
  t.fiber.leave();
}

void exit_thread() {
  threads[current].state = State::kExited;
  --launch->live;
  release_barrier();
  for (unsigned i = warp_begin(current); i < warp_end(current); ++i) {
    if (threads[i].state == State::kInCollective) release_collective(i);
  }
  threads[current].fiber.leave();
}

void enter() {
  Fiber::entered();
  (*launch->thread)();
  exit_thread();
}

unsigned random_below(unsigned n) { return launch->random() % n; }

// Threads of a warp, one after another.
struct Turn {
  unsigned thread[kWarp], count = 0;
};

// The threads of a warp that can run, in random order.
Turn ready(unsigned warp) {
  Turn turn;
  for (unsigned i = warp * kWarp; i < warp_end(warp * kWarp); ++i) {
    if (threads[i].state == State::kReady) turn.thread[turn.count++] = i;
  }
  std::shuffle(turn.thread, turn.thread + turn.count, launch->random);
  return turn;
}

void run_block() {
  const unsigned size = launch->size.x, warps = (size + kWarp - 1) / kWarp;
  start_block();
  for (unsigned i = 0; i < size; ++i) {
    threads[i].state = State::kReady;
    threads[i].fiber.start(stacks + i * kStack, kStack, enter);
  }
  launch->live = size;
  launch->at_barrier = 0;
  unsigned warp = random_below(warps);
  while (launch->live > 0) {
    if (random_below(kOvertake) == 0) warp = random_below(warps);
    Turn turn = ready(warp);
    const unsigned first = random_below(warps);
    for (unsigned i = 0; i < warps && turn.count == 0; ++i) turn = ready(warp = (first + i) % warps);
    if (turn.count == 0) throw std::runtime_error("no thread can go on:" + who_waits());
    for (unsigned i = 0; i < turn.count; ++i) {
      current = turn.thread[i];
      threads[current].fiber.resume();
      current = kNone;
      if (!launch->failure.empty()) throw std::runtime_error(launch->failure);
    }
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel, const std::function<void()>& thread) {
  if (!threads) {
    threads.reset(new Thread[kMaxThreads]);
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) throw std::bad_alloc();
  }
  const char* seed = std::getenv("KDFAST_SIMT_SEED");
  Launch state{grid, block, kernel, &thread, seed ? std::strtoul(seed, nullptr, 10) : 0};
  state.random.seed(state.seed);
  launch = &state;
  try {
    if (grid.x == 0 || block.x == 0 || block.x > kMaxThreads || shared_bytes > kMaxShared) {
      throw std::runtime_error("a launch that CUDA refuses: " + std::to_string(grid.x) + " blocks of " +
                               std::to_string(block.x) + " threads with " + std::to_string(shared_bytes) +
                               " bytes of shared memory");
    }
    start_launch(shared_bytes);
    std::vector<unsigned> order(grid.x);
    for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), state.random);
    for (unsigned i : order) {
      state.block = i;
      run_block();
    }
    launch = nullptr;
  } catch (const std::runtime_error& error) {
    launch = nullptr;
    current = kNone;
    __asan_unpoison_memory_region(stacks, kMaxThreads * kStack);  // of the threads that will not go on
    throw std::runtime_error(std::string("simt: ") + error.what() + "\n  in block " + std::to_string(state.block) +
                             " with seed " + std::to_string(state.seed) + " of " + where(kernel));
  }
}

void fail(const std::string& what) {
  launch->failure = what;
  threads[current].fiber.leave();
  std::abort();  // it is never resumed
}

void fail_absent(const char* what, int source) {
  fail(std::string(what) + " reads lane " + std::to_string(source) + ", which takes no part in it");
}

uint3 thread_index() { return {static_cast<unsigned>(current), 0, 0}; }
uint3 block_index() { return {launch->block, 0, 0}; }
dim3 block_size() { return launch->size; }
dim3 grid_size() { return launch->grid; }

void block_barrier(Place place) { wait(State::kAtBarrier, "__syncthreads", place); }

const Lanes& collective(const char* what, uint32_t mask, uint64_t offer, Place place) {
  const unsigned lane = current % kWarp, lanes = warp_end(current) - warp_begin(current);
  Thread& t = threads[current];
  t.what = what;
  t.place = place;
  t.mask = mask;
  t.offer = offer;
  const bool there = lanes == kWarp || mask >> lanes == 0;
  if (!(mask >> lane & 1) || !there) {
    t.state = State::kInCollective;
    fail(there ? "a lane calls a collective whose mask leaves it out:" + who_waits()
               : "a collective names lanes that are not there, in a warp of " + std::to_string(lanes) + ":" +
                     who_waits());
  }
  wait(State::kInCollective, what, place);
  return t.lanes;
}

void warp_barrier(uint32_t mask, Place place) { collective(kSyncWarp, mask, 0, place); }

std::string where(const void* code) {
  Dl_info library;
  if (!dladdr(code, &library)) return "?";
  char command[4096], line[1024];
  snprintf(command, sizeof(command), "addr2line -Cfpie '%s' %#zx 2>/dev/null", library.dli_fname,
           static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase));
  std::string text;
  FILE* pipe = popen(command, "r");
  while (pipe && fgets(line, sizeof(line), pipe)) text += std::string("    ") + line;
  if (pipe) pclose(pipe);
  return text.empty() ? "?" : text.substr(4, text.size() - 5);
}

}  // namespace simt
