// Shared memory, and what the accesses of kernels tell about races.
//
// Shared arrays come to life with each block, filled with NaN (bits that are all 1, in every floating type), each in an
// allocation of its own, so that the address sanitizer sees where it ends.
//
// Kernels compiled with -fsanitize=thread call the __tsan_ functions below before each access; the sanitizer's own
// runtime is not linked. All that a kernel touches has a cell that knows who wrote it last and who has read it since.
// Two accesses of different threads, one of them a write, must be ordered: by a barrier of the block or by
// __syncwarp. The other collectives order nothing, as in CUDA. Blocks are never ordered; but a block that has called
// __threadfence may touch what earlier blocks wrote: whether its handshake is right is not checked.
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "runtime.h"
#include "simt.h"

namespace simt {
namespace {

constexpr size_t kPage = 256;           // bytes whose cells lie together
constexpr size_t kCell = 16;            // bytes of a cell, until a smaller access splits those of its page
constexpr size_t kMaxPages = 16 << 10;  // then those of finished launches are dropped

// Two words, passed by value: what lies in memory in parts waits until it can be read as a whole, at each access.
struct Access {
  uint64_t when = 0;  // from the lowest bit: atomic, 1; clock, 21; thread, 10; epoch, 32
  const void* code = nullptr;

  Access() = default;
  Access(uint64_t epoch, uint64_t thread, uint64_t clock, bool atomic, const void* code)
      : when(epoch << 32 | thread << 22 | clock % (1 << 21) << 1 | atomic), code(code) {}
  uint32_t epoch() const { return when >> 32; }  // 0: never
  unsigned thread() const { return when >> 22 & 1023; }
  uint32_t clock() const { return when >> 1 & ((1u << 21) - 1); }
  bool atomic() const { return when & 1; }
};

struct Cell {
  Access write, reads[2];
};

struct Page {
  unsigned shift = __builtin_ctz(kCell);  // a cell is of 1 << shift bytes
  std::vector<Cell> cells = std::vector<Cell>(kPage / kCell);

  size_t cell_bytes() const { return size_t{1} << shift; }
  Cell& at(uintptr_t address) { return cells[address % kPage >> shift]; }

  void split(size_t bytes) {
    std::vector<Cell> parts(kPage / bytes);
    for (size_t i = 0; i < parts.size(); ++i) parts[i] = at(i * bytes);
    cells = std::move(parts);
    shift = __builtin_ctz(bytes);
  }
};

struct Array {
  const Shared* declaration;
  std::unique_ptr<char[]> data;
  size_t bytes;
};

const Shared kDynamic{"dynamic shared memory"};

std::vector<Array> arrays;  // of the running block
size_t dynamic_bytes = 0;
std::unordered_map<uintptr_t, Page> pages;
struct {
  uintptr_t number;
  Page* page;
} recent[4096] = {};  // pages, each at its number modulo 4096

// Barriers of a block are counted through all blocks and launches. Within an epoch, only lanes of a warp may be
// ordered: each counts its __syncwarps in a launch, and knows how many of each lane's come before what it does now.
uint32_t launch_epoch = 1, block_epoch = 1, epoch = 1;
uint32_t known[kMaxThreads][kWarp];
bool watching = false;  // kernels announce their accesses
bool fenced = false;

uint32_t& own_clock(unsigned thread) { return known[thread][thread % kWarp]; }

// The page of an address, with cells of at most `unit` bytes.
inline Page& page_of(uintptr_t address, size_t unit) {
  const uintptr_t number = address / kPage;
  auto& last = recent[number % 4096];
  if (!last.page || last.number != number) last = {number, &pages[number]};
  if (unit < last.page->cell_bytes()) last.page->split(unit);
  return *last.page;
}

// Whether `a` comes before what `thread`, the running one, does now.
inline bool before(Access a, unsigned thread) {
  if (a.epoch() < launch_epoch) return true;
  if (a.epoch() < block_epoch) return fenced;
  if (a.epoch() < epoch || a.thread() == thread) return true;
  return a.thread() / kWarp == thread / kWarp && known[thread][a.thread() % kWarp] >= a.clock();
}

// A new read takes the place of one that it comes after. Of more than two at once, two of different warps are enough:
// no write can come after one of them and not be seen to clash with the other.
void remember(Access (&reads)[2], Access now) {
  for (Access& read : reads) {
    if (before(read, now.thread())) {
      read = now;
      return;
    }
  }
  if (reads[0].thread() / kWarp == reads[1].thread() / kWarp) reads[1] = now;
}

const Array* array_at(uintptr_t address) {
  for (const Array& array : arrays) {
    if (address - reinterpret_cast<uintptr_t>(array.data.get()) < array.bytes) return &array;
  }
  return nullptr;
}

std::string place(uintptr_t address) {
  const Array* array = array_at(address);
  if (!array) return "global memory";
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(array->data.get());
  return "byte " + std::to_string(offset) + " of shared `" + array->declaration->name + "`";
}

[[noreturn]] void report_race(uintptr_t address, Access first, const char* did, Access now, const char* does) {
  const bool other_block = first.epoch() < block_epoch;
  fail("race: thread " + std::to_string(now.thread()) + " " + does + " " + place(address) + "\n  at " +
       where(now.code) + "\n  after thread " + std::to_string(first.thread()) +
       (other_block ? " of another block" : "") + " " + did + " it\n  at " + where(first.code) +
       "\n  with no barrier in between");
}

enum class Kind { kRead, kWrite, kAtomic };

void touch(const void* pointer, size_t bytes, Kind kind, const void* code) {
  if (!watching || current == kNone || on_stack(pointer)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  const unsigned thread = current;
  const Access now{epoch, thread, own_clock(thread) + 1, kind == Kind::kAtomic, code};  // before the next __syncwarp
  const size_t aligned = begin | bytes | kCell, unit = aligned & -aligned;  // the largest power of 2 that divides all
  for (uintptr_t address = begin, step; address < begin + bytes; address += step) {
    Page& page = page_of(address, unit);
    Cell& cell = page.at(address);
    step = page.cell_bytes();
    if (kind != Kind::kWrite && cell.write.epoch() == 0 && array_at(begin)) {
      fail("uninitialised: thread " + std::to_string(thread) + " reads " + place(address) +
           ", which nothing has written\n  at " + where(code));
    }
    if (!before(cell.write, thread) && !(kind == Kind::kAtomic && cell.write.atomic())) {
      report_race(address, cell.write, "wrote", now, kind == Kind::kRead ? "reads" : "writes");
    }
    if (kind == Kind::kRead) {
      remember(cell.reads, now);
      continue;
    }
    for (const Access& read : cell.reads) {
      if (!before(read, thread)) report_race(address, read, "read", now, "writes");
    }
    cell.write = now;
  }
}

}  // namespace

void start_launch(size_t shared_bytes) {
  dynamic_bytes = shared_bytes;
  launch_epoch = ++epoch;
  memset(known, 0, sizeof(known));
  if (pages.size() > kMaxPages) {
    pages.clear();
    for (auto& last : recent) last = {};
  }
}

void start_block() {
  arrays.clear();
  fenced = false;
  block_epoch = ++epoch;
}

void order_block() { ++epoch; }

void order_warp(unsigned warp, uint32_t lanes) {
  uint32_t all[kWarp] = {};
  const auto each = [&](auto f) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (lanes >> lane & 1) f(warp * kWarp + lane);
    }
  };
  each([&](unsigned thread) {
    ++own_clock(thread);
    for (unsigned i = 0; i < kWarp; ++i) all[i] = std::max(all[i], known[thread][i]);
  });
  each([&](unsigned thread) { memcpy(known[thread], all, sizeof(all)); });
}

void fence() { fenced = true; }

void* shared(const Shared& array, size_t bytes) {
  for (const Array& a : arrays) {
    if (a.declaration == &array) return a.data.get();
  }
  arrays.push_back({&array, std::unique_ptr<char[]>(new char[bytes]), bytes});
  char* data = arrays.back().data.get();
  memset(data, 0xff, bytes);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);  // a multiple of kCell
  for (uintptr_t at = begin, step; at < begin + bytes; at += step) {
    Page& page = page_of(at, kCell);
    page.at(at) = Cell{};
    step = page.cell_bytes();
  }
  return data;
}

void* dynamic_shared() { return shared(kDynamic, dynamic_bytes); }

void atomic_load(const void* from, void* to, size_t bytes) {
  touch(from, bytes, Kind::kAtomic, __builtin_return_address(0));
  memcpy(to, from, bytes);
}

void atomic_store(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

}  // namespace simt

// ---- what code compiled with -fsanitize=thread calls
extern "C" {

#define SIMT_HOOK(size)                                                                                         \
  void __tsan_read##size(void* at) { simt::touch(at, size, simt::Kind::kRead, __builtin_return_address(0)); }   \
  void __tsan_write##size(void* at) { simt::touch(at, size, simt::Kind::kWrite, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* at) {                                                                  \
    simt::touch(at, size, simt::Kind::kRead, __builtin_return_address(0));                                      \
  }                                                                                                             \
  void __tsan_unaligned_write##size(void* at) {                                                                 \
    simt::touch(at, size, simt::Kind::kWrite, __builtin_return_address(0));                                     \
  }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)

void __tsan_read_range(void* at, size_t bytes) {
  simt::touch(at, bytes, simt::Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  simt::touch(at, bytes, simt::Kind::kWrite, __builtin_return_address(0));
}
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
void __tsan_init() { simt::watching = true; }  // when such code is loaded
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
