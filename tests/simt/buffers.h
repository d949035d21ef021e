// Global memory: the buffers that kernels may touch, what a launch and a block have moved of them, and who
// touched what last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "order.h"

namespace simt {

inline constexpr uintptr_t sector_bytes = 32;

class Buffers {
 public:
  // How many sectors were touched for the first time.
  struct Fresh {
    int launch = 0, block = 0;
  };

  void allow(const void* data, size_t bytes) {
    if (bytes == 0) return;
    Buffer added{reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data) + bytes, {}};
    // Views of one memory are one buffer.
    for (auto other = all_.begin(); other != all_.end();) {
      if (other->begin < added.end && added.begin < other->end) {
        added.begin = std::min(added.begin, other->begin);
        added.end = std::max(added.end, other->end);
        other = all_.erase(other);
      } else {
        ++other;
      }
    }
    added.pages.resize((added.end - 1) / page_bytes - added.begin / page_bytes + 1);
    const auto after = [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; };
    all_.insert(std::upper_bound(all_.begin(), all_.end(), added, after), std::move(added));
  }
  void forget() { all_.clear(); }

  void start_launch() { ++launch_; }
  void start_block() { ++block_; }

  // The number of the buffer that has all these bytes, or -1. `guess`: where it was last time.
  int find(uintptr_t begin, size_t bytes, int guess) const {
    if (static_cast<size_t>(guess) < all_.size() && all_[static_cast<size_t>(guess)].has(begin, bytes))
      return guess;
    for (size_t i = 0; i < all_.size(); ++i) {
      if (all_[i].has(begin, bytes)) return static_cast<int>(i);
    }
    return -1;
  }

  // Marks sectors as loaded or stored.
  Fresh mark(int buffer, uintptr_t begin, size_t bytes, bool store) {
    Fresh fresh;
    for (uintptr_t s = begin / sector_bytes; s <= (begin + bytes - 1) / sector_bytes; ++s) {
      Page& page = page_of(buffer, s * sector_bytes);
      Sector& sector = page.sectors[s % (page_bytes / sector_bytes)];
      fresh.launch += touch(store ? sector.launch_store : sector.launch_load, launch_);
      fresh.block += touch(store ? sector.block_store : sector.block_load, block_);
    }
    return fresh;
  }

  // Calls f(cell) for all memory that an access touches. A cell begins as 16 bytes; those of a page are split
  // where an access has smaller parts.
  template <typename F>
  void for_cells(int buffer, uintptr_t begin, size_t bytes, size_t part, const F& f) {
    for (uintptr_t at = begin; at < begin + bytes;) {
      Page& page = page_of(buffer, at);
      if (page.cells.empty()) page.cells.resize(page_bytes / page.cell_bytes);
      while (page.cell_bytes > part) split(page);
      Cell& cell = page.cells[at % page_bytes / page.cell_bytes];
      cell.enter(launch_);
      f(cell);
      at += page.cell_bytes;
    }
  }

 private:
  static constexpr uintptr_t page_bytes = 4096;

  // Number of the launch, and of the block, that last loaded and stored it.
  struct Sector {
    uint32_t launch_load = 0, launch_store = 0, block_load = 0, block_store = 0;
  };
  struct Page {
    Sector sectors[page_bytes / sector_bytes];
    size_t cell_bytes = 16;
    std::vector<Cell> cells;
  };
  struct Buffer {
    uintptr_t begin, end;
    std::vector<std::unique_ptr<Page>> pages;

    bool has(uintptr_t at, size_t bytes) const { return begin <= at && at + bytes <= end; }
  };

  static bool touch(uint32_t& last, uint32_t now) {
    const bool first = last != now;
    last = now;
    return first;
  }

  static void split(Page& page) {
    std::vector<Cell> halves;
    for (const Cell& cell : page.cells) halves.insert(halves.end(), 2, cell);
    page.cells.swap(halves);
    page.cell_bytes /= 2;
  }

  Page& page_of(int buffer, uintptr_t address) {
    Buffer& b = all_[static_cast<size_t>(buffer)];
    auto& page = b.pages[address / page_bytes - b.begin / page_bytes];
    if (!page) page = std::make_unique<Page>();
    return *page;
  }

  std::vector<Buffer> all_;
  uint32_t launch_ = 0, block_ = 0;
};

}  // namespace simt
