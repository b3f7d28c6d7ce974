// Loads and stores. An access has to be aligned to its width and inside: global memory inside a tensor that the op was
// given or made, shared memory inside what the kernel declares and the launch adds, local memory above the stack
// pointer.
//
// Of global memory the 32-byte sectors of each request are counted, which L1 asks L2 for where it has none of them, and
// the different sectors of a launch, which are asked for if all that was read is kept. Shared memory has 32 banks of 4
// bytes; a request takes a wavefront for each 128 bytes, and one more wherever lanes of it want different words of a
// bank.
#include <algorithm>

#include "machine.h"

namespace sass {
namespace {

constexpr uintptr_t kSector = 32;
constexpr int kStackPointer = 1;

struct Range {
  uintptr_t begin, end;
  std::vector<bool> seen[2];  // sectors that were read, and written, in this launch
};

std::vector<Range> ranges;  // in order, and apart from each other
size_t recent = 0;

Range* find(uintptr_t address, int bytes) {
  const auto inside = [&](const Range& r) { return r.begin <= address && address + bytes <= r.end; };
  if (recent < ranges.size() && inside(ranges[recent])) return &ranges[recent];
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address, [](uintptr_t a, const Range& r) { return a < r.begin; });
  if (after == ranges.begin() || !inside(*(after - 1))) return nullptr;
  recent = after - ranges.begin() - 1;
  return &ranges[recent];
}

// Whether the launch had not touched the sector before.
bool mark(uintptr_t sector, bool write) {
  Range* range = find(sector * kSector, 1);
  if (!range) range = find(sector * kSector + kSector - 1, 1);  // it begins inside the sector
  if (!range) return false;
  const uintptr_t first = range->begin / kSector;
  std::vector<bool>& seen = range->seen[write];
  if (seen.empty()) seen.resize(range->end / kSector + 1 - first);
  if (seen[sector - first]) return false;
  return seen[sector - first] = true;
}

std::string described(const char* space, bool write, int bytes, uint64_t address) {
  return std::string(write ? " writes " : " reads ") + std::to_string(bytes) + " bytes of " + space + " memory at " +
         hex(address);
}

// The addresses of lanes in steps of `unit` bytes, each once.
template <class F>
void each_once(const Vec<uint64_t>& addresses, Mask lanes, int bytes, uint64_t unit, F f) {
  uint64_t units[kLanes];
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (uint64_t at = addresses[lane] / unit; at <= (addresses[lane] + bytes - 1) / unit; ++at) units[count++] = at;
  }
  std::sort(units, units + count);
  std::for_each(units, std::unique(units, units + count), f);
}

// Whether a sector was new.
bool count_sectors(Counts::Traffic& traffic, const Vec<uint64_t>& addresses, Mask lanes, bool write) {
  ++traffic.requests;
  bool is_new = false;
  each_once(addresses, lanes, 1, kSector, [&](uint64_t sector) {
    ++traffic.sectors;
    is_new |= mark(sector, write);
  });
  return is_new;
}

void count_banks(Counts& counts, const Vec<uint64_t>& addresses, Mask lanes, int bytes) {
  ++counts.shared_requests;
  const int together = std::min(kLanes, 128 / bytes);  // lanes of a wavefront, where they do not conflict
  for (int first = 0; first < kLanes; first += together) {
    const Mask part = lanes & (kAllLanes >> (kLanes - together)) << first;
    int banks[kLanes] = {};
    each_once(addresses, part, bytes, 4, [&](uint64_t word) { ++banks[word % kLanes]; });
    counts.conflicts += std::max(*std::max_element(banks, banks + kLanes) - 1, 0);
  }
}

const char* const kNames[] = {"global", "shared", "local"};

}  // namespace

const uint32_t kStackEnd = 4 << 10;

void allow(void* begin, size_t bytes) {
  Range range{reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes, {}};
  const Range* known = find(range.begin, static_cast<int>(std::min<size_t>(bytes, 1)));
  if (known && known->begin == range.begin && known->end == range.end) return;
  const auto overlaps = [&](const Range& r) { return r.begin < range.end && range.begin < r.end; };
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), overlaps), ranges.end());  // it has been freed
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), range.begin,
                                      [](uintptr_t a, const Range& r) { return a < r.begin; });
  ranges.insert(after, range);
}

void forget_all() { ranges.clear(); }

void end_sectors(Counts& counts) {
  for (Range& range : ranges) {
    for (int write = 0; write < 2; ++write) {
      (write ? counts.stores : counts.loads).distinct +=
          std::count(range.seen[write].begin(), range.seen[write].end(), true);
      range.seen[write].clear();
    }
  }
}

uint64_t Warp::constant(uint64_t offset, int bytes) const {
  const std::vector<uint8_t>& bank = block.launch.constants;
  if (offset + bytes > bank.size() || offset % bytes != 0) {
    throw Fault("reads " + std::to_string(bytes) + " bytes of the constant bank at " + hex(offset));
  }
  uint64_t x = 0;
  memcpy(&x, bank.data() + offset, bytes);
  return x;
}

uint8_t* Warp::place(Space space, uint64_t address, int bytes, int lane, bool write) {
  const auto fail = [&](const char* why) {
    throw Fault(thread(lane) + described(kNames[static_cast<int>(space)], write, bytes, address) + ", which is " + why);
  };
  if (address % bytes != 0) fail("misaligned");
  switch (space) {
    case Space::kGlobal:
      if (!find(address, bytes)) fail("out of bounds");
      return reinterpret_cast<uint8_t*>(address);
    case Space::kShared:
      if (address < kSharedBegin || address + bytes > block.shared.size()) fail("out of bounds");
      return block.shared.data() + address;
    default:
      if (address < registers_[kStackPointer][lane] || address + bytes > kStackEnd) fail("out of bounds");
      if (local_.empty()) local_.assign(kLanes * kStackEnd, 0xff);
      return local_.data() + lane * kStackEnd + address;
  }
}

void Warp::count(Space space, const Vec<uint64_t>& addresses, Mask lanes, int bytes, bool write) {
  if (space == Space::kGlobal && write) count_sectors(block.counts.stores, addresses, lanes, true);
  if (space == Space::kGlobal && !write) far_ |= count_sectors(block.counts.loads, addresses, lanes, false);
  if (space == Space::kShared) count_banks(block.counts, addresses, lanes, bytes);
}

void Warp::load(Space space, const Operand& from, Mask lanes, int bytes, Vec<uint32_t>* words) {
  const Vec<uint64_t> address = addresses(from);
  count(space, address, lanes, bytes, false);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t x[4] = {};
    memcpy(x, place(space, address[lane], bytes, lane, false), bytes);
    for (int i = 0; i < (bytes + 3) / 4; ++i) words[i][lane] = x[i];
  }
}

void Warp::store(Space space, const Operand& to, Mask lanes, int bytes, const Vec<uint32_t>* words) {
  const Vec<uint64_t> address = addresses(to);
  count(space, address, lanes, bytes, true);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t x[4];
    for (int i = 0; i < (bytes + 3) / 4; ++i) x[i] = words[i][lane];
    memcpy(place(space, address[lane], bytes, lane, true), x, bytes);
  }
}

Vec<uint32_t> Warp::update_shared(const Operand& at, Mask lanes, const Vec<uint32_t>& x,
                                  uint32_t (*f)(uint32_t, uint32_t)) {
  const Vec<uint64_t> address = addresses(at);
  count(Space::kShared, address, lanes, 4, true);
  Vec<uint32_t> old = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    uint8_t* word = place(Space::kShared, address[lane], 4, lane, true);
    memcpy(&old[lane], word, 4);
    const uint32_t now = f(old[lane], x[lane]);
    memcpy(word, &now, 4);
  }
  return old;
}

uint32_t shared_end(const Launch& launch) {
  return std::max(launch.kernel->shared_end, kSharedBegin) + launch.dynamic_shared;
}

}  // namespace sass
