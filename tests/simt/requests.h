// What the lanes of a warp ask of memory together: the k-th access of each lane at one place in the source is
// one request.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>
#include <vector>

#include "buffers.h"

namespace simt {

using Place = std::source_location;

// What the launches of an op did, all blocks together.
struct Counts {
  // Global memory. A sector has 32 bytes; `sectors` adds up those of each request, `ideal_sectors` is what
  // the same bytes would take side by side.
  int64_t loaded_bytes = 0, stored_bytes = 0, atomics = 0, requests = 0, sectors = 0, ideal_sectors = 0;
  // Bytes that move where a cache keeps all that a launch touches, and where it keeps all that a block
  // touches: each sector once for loads, once for stores.
  int64_t dram_bytes = 0, l2_bytes = 0;
  // Shared memory. A bank conflict is one more pass over the banks.
  int64_t shared_requests = 0, shared_atomics = 0, bank_conflicts = 0;
  int64_t launches = 0, blocks = 0;
  // Of the largest block: bytes of shared memory, threads.
  int64_t shared_bytes = 0, threads = 0;
};

// A place in the source that touches memory, with elements of one size. A GPU moves an element in pieces: of
// its alignment, 16 bytes at most.
struct Site {
  Place place;
  const char* file;
  uint32_t position;
  uint16_t bytes;
  uint16_t piece;  // 0: not memory but a barrier
  bool shared;
  int buffer = 0;  // where it found its last address
};

// All sites that a process meets.
class Sites {
 public:
  int number(const Place& place, size_t bytes, size_t piece, bool shared) {
    const char* const file = place.file_name();
    const uint32_t position = place.line() << 10 ^ place.column();
    const size_t hash =
        (reinterpret_cast<uintptr_t>(file) ^ position * 0x9e3779b97f4a7c15u ^ bytes << 1 ^ shared) *
        0x9e3779b97f4a7c15u;
    for (size_t i = hash >> 40;; ++i) {
      int& slot = table_[i % table_.size()];
      if (slot < 0) {
        if (2 * all_.size() >= table_.size()) return grow(), number(place, bytes, piece, shared);
        slot = static_cast<int>(all_.size());
        all_.push_back(
            {place, file, position, static_cast<uint16_t>(bytes), static_cast<uint16_t>(piece), shared});
        return slot;
      }
      const Site& site = all_[static_cast<size_t>(slot)];
      if (site.file == file && site.position == position && site.bytes == bytes && site.piece == piece &&
          site.shared == shared) {
        return slot;
      }
    }
  }
  Site& operator[](int number) { return all_[static_cast<size_t>(number)]; }
  size_t size() const { return all_.size(); }

 private:
  void grow() {
    std::vector<Site> old;
    old.swap(all_);
    table_.assign(2 * table_.size(), -1);
    for (const Site& site : old) number(site.place, site.bytes, site.piece, site.shared);
  }

  std::vector<Site> all_;
  std::vector<int> table_ = std::vector<int>(1024, -1);
};

// The requests of a block.
class Requests {
 public:
  explicit Requests(Sites& sites) : sites_(sites) {}

  void start_block(int threads) {
    threads_ = static_cast<size_t>(threads);
    uses_.resize(sites_.size());
    for (Use& use : uses_) use.clear();
  }

  // A thread touches memory, in shared memory counted from the start of the array.
  void add(int site, int thread, uintptr_t address, Counts& counts) {
    if (static_cast<size_t>(site) >= uses_.size()) uses_.resize(sites_.size());
    Use& use = uses_[static_cast<size_t>(site)];
    if (use.visits.empty()) {
      use.visits.resize(threads_);
      use.windows.resize(threads_ / warp_size);
    }
    const uint32_t visit = use.visits[static_cast<size_t>(thread)]++;
    Window& window = use.windows[static_cast<size_t>(thread / warp_size)];
    while (window.open.size() <= visit - window.first) window.open.push_back(fresh());
    Request& request = *window.open[visit - window.first];
    request.lanes |= 1u << thread % warp_size;
    request.addresses[static_cast<size_t>(thread % warp_size)] = address;
    if (request.lanes != 0xffffffff) return;
    count(sites_[site], request, counts);
    spare_.push_back(std::move(window.open[visit - window.first]));
    size_t done = 0;
    while (done < window.open.size() && !window.open[done]) ++done;
    window.open.erase(window.open.begin(), window.open.begin() + static_cast<std::ptrdiff_t>(done));
    window.first += static_cast<uint32_t>(done);
  }

  // Those that not all lanes came to.
  void finish_block(Counts& counts) {
    for (size_t site = 0; site < uses_.size(); ++site) {
      for (Window& window : uses_[site].windows) {
        for (auto& request : window.open) {
          if (!request) continue;
          count(sites_[static_cast<int>(site)], *request, counts);
          spare_.push_back(std::move(request));
        }
      }
      uses_[site].clear();
    }
  }

 private:
  struct Request {
    uint32_t lanes = 0;
    std::array<uintptr_t, warp_size> addresses;
  };
  // The requests of a warp at a site from the first that is not complete.
  struct Window {
    std::vector<std::unique_ptr<Request>> open;
    uint32_t first = 0;
  };
  struct Use {
    std::vector<uint32_t> visits;  // of each thread
    std::vector<Window> windows;   // of each warp

    void clear() {
      visits.clear();
      windows.clear();
    }
  };
  // Numbers of which the distinct ones are counted.
  struct Distinct {
    std::array<uintptr_t, warp_size> values;
    size_t size = 0;
    bool sorted = true;

    void add(uintptr_t value) {
      if (size && values[size - 1] == value) return;
      sorted &= !size || values[size - 1] < value;
      values[size++] = value;
    }
    int64_t count() {
      if (sorted) return static_cast<int64_t>(size);
      std::sort(values.begin(), values.begin() + size);
      return std::unique(values.begin(), values.begin() + size) - values.begin();
    }
  };

  std::unique_ptr<Request> fresh() {
    if (spare_.empty()) return std::make_unique<Request>();
    std::unique_ptr<Request> request = std::move(spare_.back());
    spare_.pop_back();
    request->lanes = 0;
    return request;
  }

  static void count(const Site& site, const Request& request, Counts& counts) {
    for (uintptr_t piece = 0; piece < site.bytes; piece += site.piece) {
      if (site.shared) {
        count_shared(site.piece, request, piece, counts);
      } else {
        count_global(site.piece, request, piece, counts);
      }
    }
  }

  static void count_global(uintptr_t bytes, const Request& request, uintptr_t offset, Counts& counts) {
    Distinct sectors, addresses;
    for (size_t lane = 0; lane < warp_size; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      addresses.add(request.addresses[lane]);
      sectors.add((request.addresses[lane] + offset) / sector_bytes);
    }
    ++counts.requests;
    counts.sectors += sectors.count();
    counts.ideal_sectors += (addresses.count() * static_cast<int64_t>(bytes) + 31) / 32;
  }

  // 32 banks of 4 bytes. Lanes that touch one word together do not conflict. At most 128 bytes pass at a
  // time: a request of 8 or 16 bytes a lane passes by halves or quarters of a warp.
  static void count_shared(uintptr_t bytes, const Request& request, uintptr_t offset, Counts& counts) {
    const uintptr_t unit = std::max<uintptr_t>(bytes, 4), banks = 128 / unit;
    ++counts.shared_requests;
    for (size_t first = 0; first < warp_size; first += banks) {
      std::array<uintptr_t, 32> of_bank{};
      bool conflict = false;
      for (size_t lane = first; lane < first + banks; ++lane) {
        if (!(request.lanes >> lane & 1)) continue;
        const uintptr_t place = (request.addresses[lane] + offset) / unit + 1;
        uintptr_t& found = of_bank[place % banks];
        conflict |= found && found != place;
        found = place;
      }
      if (!conflict) continue;
      std::array<Distinct, 32> all;
      for (size_t lane = first; lane < first + banks; ++lane) {
        if (!(request.lanes >> lane & 1)) continue;
        const uintptr_t place = (request.addresses[lane] + offset) / unit;
        all[place % banks].add(place);
      }
      int64_t passes = 1;
      for (Distinct& bank : all) passes = std::max(passes, bank.count());
      counts.bank_conflicts += passes - 1;
    }
  }

  Sites& sites_;
  size_t threads_ = 0;
  std::vector<Use> uses_;
  std::vector<std::unique_ptr<Request>> spare_;
};

}  // namespace simt
