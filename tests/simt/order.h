// Which accesses to memory a barrier keeps apart, and which race.
#pragma once

#include <cstdint>
#include <vector>

namespace simt {

inline constexpr int warp_size = 32;

enum class Access { load, store, atomic };

// What is wrong with an access: nothing; another thread's store is not kept apart from it; it stores what
// another thread may yet read.
enum class Race { none, unordered, overwrites };

// When an access takes place. An epoch begins with each block and each of its barriers; inside it a warp
// counts its own barriers.
struct Moment {
  uint32_t epoch, warp_barriers;
  uint16_t thread;
};

// What the last threads did with a piece of memory, in one block (shared memory) or one launch (global
// memory), which the era tells.
struct Cell {
  uint32_t era = 0;
  // The last store; epoch 0: none.
  uint32_t store_epoch = 0, store_barriers = 0;
  uint16_t store_thread = 0;
  // Those since who read, or those who added: the lanes of one warp, and whether there were others.
  uint16_t warp = 0;
  uint32_t lanes = 0, epoch = 0, warp_barriers = 0;
  bool add = false, other_warps = false, other_blocks = false;
  bool stored = false;  // or added to

  void enter(uint32_t now) {
    if (era != now) *this = {now};
  }
};

class Order {
 public:
  // ---- what threads do ----

  void start_block(int threads) {
    first_epoch_ = ++epoch_;
    warps_.resize(static_cast<size_t>(threads / warp_size));
    for (Warp& warp : warps_) warp = {};
  }
  void block_barrier() {
    ++epoch_;
    for (Warp& warp : warps_) warp = {};
  }
  void warp_barrier(int warp, uint32_t mask) {
    Warp& w = warps_[static_cast<size_t>(warp)];
    w.masks.push_back(mask);
    if (mask == 0xffffffff) w.after_full = static_cast<uint32_t>(w.masks.size());
  }

  Moment now(int thread) const {
    const Warp& warp = warps_[static_cast<size_t>(thread / warp_size)];
    return {epoch_, static_cast<uint32_t>(warp.masks.size()), static_cast<uint16_t>(thread)};
  }

  // ---- an access ----

  Race touch(Cell& cell, Access access, const Moment& now) const {
    if (cell.store_epoch && !store_is_before(cell, now)) return Race::unordered;
    const bool add = access == Access::atomic;
    const bool apart = access == Access::store || (cell.lanes && cell.add != add);
    const bool before = users_are_before(cell, now);
    if (apart && !before) return cell.add || add ? Race::unordered : Race::overwrites;
    if (access == Access::store) {
      cell.store_epoch = now.epoch;
      cell.store_barriers = now.warp_barriers;
      cell.store_thread = now.thread;
      cell.lanes = 0;
      cell.other_warps = false;
    } else {
      join(cell, now, before);
      cell.add = add;
    }
    cell.stored |= access != Access::load;
    return Race::none;
  }

 private:
  struct Warp {
    std::vector<uint32_t> masks;  // of its barriers in this epoch
    uint32_t after_full = 0;      // how many there were after the last that all lanes came to
  };

  bool store_is_before(const Cell& cell, const Moment& now) const {
    if (cell.store_thread == now.thread && cell.store_epoch >= first_epoch_) return true;
    if (cell.store_epoch != now.epoch) return cell.store_epoch >= first_epoch_;
    if (cell.store_thread / warp_size != now.thread / warp_size) return false;
    return lanes_are_before(1u << cell.store_thread % warp_size, cell.store_barriers, now);
  }

  bool users_are_before(const Cell& cell, const Moment& now) const {
    if (cell.other_blocks) return false;
    if (!cell.lanes) return true;
    if (cell.epoch != now.epoch) return cell.epoch >= first_epoch_;
    if (cell.other_warps || cell.warp != now.thread / warp_size) return false;
    return lanes_are_before(cell.lanes, cell.warp_barriers, now);
  }

  // Whether what these lanes of the thread's own warp did, after so many barriers, is done for the thread.
  bool lanes_are_before(uint32_t lanes, uint32_t barriers, const Moment& now) const {
    const Warp& warp = warps_[now.thread / warp_size];
    const uint32_t self = 1u << now.thread % warp_size;
    lanes &= ~self;
    if (!lanes || barriers < warp.after_full) return true;
    for (; lanes; lanes &= lanes - 1) {
      uint32_t know = lanes & -lanes;
      for (size_t i = barriers; i < warp.masks.size(); ++i) {
        if (know & warp.masks[i]) know |= warp.masks[i];
      }
      if (!(know & self)) return false;
    }
    return true;
  }

  // One more who reads or adds. Where all others are kept apart from it, it stands for them.
  void join(Cell& cell, const Moment& now, bool others_are_before) const {
    const auto warp = static_cast<uint16_t>(now.thread / warp_size);
    const uint32_t self = 1u << now.thread % warp_size;
    const bool together = !others_are_before && cell.lanes && cell.epoch == now.epoch;
    cell.other_blocks |= !others_are_before && cell.lanes && cell.epoch < first_epoch_;
    cell.other_warps = together && (cell.other_warps || cell.warp != warp);
    cell.lanes = together && cell.warp == warp ? cell.lanes | self : self;
    cell.warp = warp;
    cell.epoch = now.epoch;
    cell.warp_barriers = now.warp_barriers;
  }

  uint32_t epoch_ = 0, first_epoch_ = 1;
  std::vector<Warp> warps_;
};

}  // namespace simt
