// A CUDA kernel on the CPU: grid, blocks, warps of 32, barriers, shuffles, shared memory, atomics. Each
// thread of a block is a fiber, blocks run one after the other. A kernel that breaks the rules of the device
// throws Failure:
//
//   - a barrier that not every thread reaches, or that threads reach at different places;
//   - a warp operation whose mask names a lane that does not come, or leaves out the caller or the source;
//   - an access outside the buffers that Machine::allow() named;
//   - shared memory that is read before it is written, or touched by two threads with no barrier in between.
//
// Threads are picked at random from a seed, and also change over at memory accesses, so that a result that
// depends on their order shows as a difference between seeds. Accesses are counted by warp: the k-th access
// of each lane at one place in the source is one request.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"

namespace simt {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned count() const { return x * y * z; }
};

using Place = std::source_location;

// What a launch did, all blocks together. A sector has 32 bytes; `ideal_sectors` is what the same bytes would
// take side by side. A bank conflict is one more pass over the banks of shared memory.
struct Counts {
  int64_t loaded_bytes = 0, stored_bytes = 0, requests = 0, sectors = 0, ideal_sectors = 0;
  int64_t atomics = 0, shared_requests = 0, bank_conflicts = 0;
};

inline constexpr int warp_size = 32;

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // Buffers that kernels may touch.
  void allow(const void* data, size_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    buffers_[begin] = std::max(buffers_[begin], begin + bytes);
  }
  void forget_buffers() { buffers_.clear(); }

  const Counts& counts() const { return counts_; }

  // Runs `kernel()` on every thread of the grid.
  template <typename Kernel>
  void launch(Dim3 grid, Dim3 block, uint64_t seed, const Kernel& kernel) {
    counts_ = {};
    random_.seed(seed);
    grid_ = grid;
    block_ = block;
    if (block.count() == 0 || block.count() > 1024 || block.count() % warp_size) {
      throw Failure("a block has " + std::to_string(block.count()) + " threads, not whole warps up to 1024");
    }
    std::vector<unsigned> order(grid.count());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    for (const unsigned index : order) {
      block_index_ = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
      run_block(kernel);
    }
  }

  // ---- what kernels call ----

  Dim3 thread_index() const {
    const unsigned i = current_->index;
    return {i % block_.x, i / block_.x % block_.y, i / block_.x / block_.y};
  }
  Dim3 block_index() const { return block_index_; }
  Dim3 block_size() const { return block_; }
  Dim3 grid_size() const { return grid_; }

  void block_barrier(Place place) { wait(State::block_barrier, place, 0, 0); }

  // Meets the lanes of `mask`; then returns what each of them brought.
  const std::array<uint64_t, warp_size>& meet(uint32_t mask, uint64_t value, bool orders_memory,
                                              Place place) {
    const int lane = current_->index % warp_size;
    if (!(mask >> lane & 1)) fail("lane " + std::to_string(lane) + " is not in its own mask", place);
    wait(orders_memory ? State::warp_barrier : State::warp_exchange, place, mask, value);
    return current_->met;
  }

  void global_access(const void* address, size_t bytes, bool store, bool atomic, Place place) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    auto after = buffers_.upper_bound(begin);
    if (after == buffers_.begin() || std::prev(after)->second < begin + bytes) {
      fail("an access of " + std::to_string(bytes) + " bytes outside every buffer", place);
    }
    if (begin % bytes) fail("an access of " + std::to_string(bytes) + " bytes at a crooked address", place);
    (store ? counts_.stored_bytes : counts_.loaded_bytes) += static_cast<int64_t>(bytes);
    counts_.atomics += atomic;
    request(global_requests_, place).emplace_back(begin, bytes);
    maybe_yield();
  }

  // Who touched an element of shared memory last: the writer, and the readers since.
  struct Cell {
    struct Access {
      int thread = -1;
      int64_t block_epoch = -1, warp_epoch = -1;
    };
    Access write;
    std::vector<Access> reads;
  };

  void shared_access(Cell& cell, uintptr_t offset, size_t bytes, bool store, Place place) {
    if (!store && cell.write.thread < 0) fail("shared memory is read that nobody wrote", place);
    const Cell::Access now{static_cast<int>(current_->index), block_epoch_,
                           warp_epochs_[current_->index / warp_size]};
    if (races(cell.write, now)) {
      fail("two threads touch shared memory, one writes, no barrier between", place);
    }
    if (store) {
      for (const Cell::Access& read : cell.reads) {
        if (races(read, now)) fail("shared memory is overwritten that another thread may yet read", place);
      }
      cell.reads.clear();
      cell.write = now;
    } else {
      cell.reads.push_back(now);
    }
    request(shared_requests_, place).emplace_back(offset, bytes);
    maybe_yield();
  }

  // An array of shared memory: one a block and place.
  template <typename Array>
  Array& shared_array(size_t count, Place place) {
    auto& slot = shared_[{place.file_name(), place.line()}];
    if (!slot) {
      slot = std::make_shared<Array>(count, shared_bytes_);
      shared_bytes_ += sizeof(typename Array::Element) * count;
    }
    return *static_cast<Array*>(slot.get());
  }

  [[noreturn]] void fail(const std::string& what, Place place) const {
    throw Failure(what + " (thread " + std::to_string(current_ ? current_->index : 0) + " of block " +
                  std::to_string(block_index_.x) + ", line " + std::to_string(place.line()) + ")");
  }

 private:
  enum class State { ready, block_barrier, warp_barrier, warp_exchange, done };

  struct Thread {
    unsigned index = 0;
    State state = State::ready;
    Place place;
    uint32_t mask = 0;
    uint64_t value = 0;
    std::array<uint64_t, warp_size> met{};
    std::map<std::tuple<const char*, unsigned, unsigned>, int64_t> visits;
    std::unique_ptr<Fiber> fiber;
    std::exception_ptr error;
  };

  using Request = std::vector<std::pair<uintptr_t, size_t>>;
  using Requests = std::map<std::tuple<unsigned, const char*, unsigned, unsigned, int64_t>, Request>;

  template <typename Kernel>
  void run_block(const Kernel& kernel) {
    threads_.clear();
    shared_.clear();
    shared_bytes_ = 0;
    block_epoch_ = 0;
    warp_epochs_.assign(block_.count() / warp_size, 0);
    for (unsigned i = 0; i < block_.count(); ++i) {
      threads_.push_back(std::make_unique<Thread>());
      Thread* thread = threads_.back().get();
      thread->index = i;
      thread->fiber = std::make_unique<Fiber>([thread, &kernel] {
        try {
          kernel();
        } catch (...) {
          thread->error = std::current_exception();
        }
        thread->state = State::done;
      });
    }
    std::vector<Thread*> ready;
    for (;;) {
      ready.clear();
      for (const auto& thread : threads_) {
        if (thread->state == State::ready) ready.push_back(thread.get());
      }
      if (ready.empty()) {
        if (std::all_of(threads_.begin(), threads_.end(), [](auto& t) { return t->state == State::done; }))
          break;
        release();
        continue;
      }
      current_ = ready[random_() % ready.size()];
      current_->fiber->resume();
      if (current_->error) std::rethrow_exception(current_->error);
    }
    current_ = nullptr;
    count_requests();
  }

  // Nobody can run: lets those go on who have met, or says why nobody can.
  void release() {
    bool released = false;
    for (unsigned first = 0; first < threads_.size(); first += warp_size) {
      for (unsigned i = first; i < first + warp_size; ++i) {
        Thread& thread = *threads_[i];
        if (thread.state != State::warp_barrier && thread.state != State::warp_exchange) continue;
        std::array<uint64_t, warp_size> met{};
        for (unsigned lane = 0; lane < warp_size; ++lane) {
          if (!(thread.mask >> lane & 1)) continue;
          const Thread& other = *threads_[first + lane];
          if (other.state != thread.state || other.mask != thread.mask || !same(other.place, thread.place)) {
            current_ = &thread;
            fail("a warp operation waits for lane " + std::to_string(lane) +
                     ", which its mask names and which " +
                     (other.state == State::done ? "has ended" : "is elsewhere"),
                 thread.place);
          }
          met[lane] = other.value;
        }
        if (thread.state == State::warp_barrier) ++warp_epochs_[first / warp_size];
        const uint32_t mask = thread.mask;
        for (unsigned lane = 0; lane < warp_size; ++lane) {
          if (!(mask >> lane & 1)) continue;
          threads_[first + lane]->met = met;
          threads_[first + lane]->state = State::ready;
        }
        released = true;
      }
    }
    if (released) return;
    for (const auto& thread : threads_) {
      if (thread->state == State::done || !same(thread->place, threads_[0]->place)) {
        const Thread& waiting = thread->state == State::done ? waiting_thread() : *thread;
        current_ = threads_[waiting.index].get();
        fail(thread->state == State::done ? "a barrier is not reached by a thread that has ended"
                                          : "threads wait at different barriers",
             waiting.place);
      }
    }
    ++block_epoch_;
    for (const auto& thread : threads_) thread->state = State::ready;
  }

  const Thread& waiting_thread() const {
    for (const auto& thread : threads_) {
      if (thread->state != State::done) return *thread;
    }
    return *threads_[0];
  }

  void wait(State state, Place place, uint32_t mask, uint64_t value) {
    current_->state = state;
    current_->place = place;
    current_->mask = mask;
    current_->value = value;
    current_->fiber->suspend();
  }

  void maybe_yield() {
    if (random_() % 8 == 0) current_->fiber->suspend();
  }

  static bool same(const Place& a, const Place& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
  }

  static bool races(const Cell::Access& before, const Cell::Access& now) {
    if (before.thread < 0 || before.thread == now.thread || before.block_epoch != now.block_epoch)
      return false;
    const bool one_warp = before.thread / warp_size == now.thread / warp_size;
    return !(one_warp && before.warp_epoch < now.warp_epoch);
  }

  Request& request(Requests& all, Place place) {
    const int64_t visit = current_->visits[{place.file_name(), place.line(), place.column()}]++;
    return all[{current_->index / warp_size, place.file_name(), place.line(), place.column(), visit}];
  }

  void count_requests() {
    for (const auto& [key, request] : global_requests_) {
      std::set<uintptr_t> sectors;
      std::set<std::pair<uintptr_t, size_t>> distinct(request.begin(), request.end());
      size_t bytes = 0;
      for (const auto& [begin, size] : distinct) {
        bytes += size;
        for (uintptr_t sector = begin / 32; sector <= (begin + size - 1) / 32; ++sector)
          sectors.insert(sector);
      }
      ++counts_.requests;
      counts_.sectors += static_cast<int64_t>(sectors.size());
      counts_.ideal_sectors += static_cast<int64_t>((bytes + 31) / 32);
    }
    for (const auto& [key, request] : shared_requests_) {
      // Words of 4 bytes; lanes that read one word together do not conflict. A request of more than 128 bytes
      // is split, which is no conflict.
      std::array<std::set<uintptr_t>, 32> banks;
      std::set<uintptr_t> words;
      for (const auto& [begin, size] : request) {
        for (uintptr_t word = begin / 4; word <= (begin + size - 1) / 4; ++word) {
          banks[word % 32].insert(word);
          words.insert(word);
        }
      }
      size_t passes = 1;
      for (const auto& bank : banks) passes = std::max(passes, bank.size());
      ++counts_.shared_requests;
      counts_.bank_conflicts += static_cast<int64_t>(passes - std::max<size_t>(1, (words.size() + 31) / 32));
    }
    global_requests_.clear();
    shared_requests_.clear();
  }

  std::map<uintptr_t, uintptr_t> buffers_;
  Counts counts_;
  std::mt19937_64 random_;
  Dim3 grid_, block_, block_index_;
  std::vector<std::unique_ptr<Thread>> threads_;
  Thread* current_ = nullptr;
  int64_t block_epoch_ = 0;
  std::vector<int64_t> warp_epochs_;
  std::map<std::pair<std::string, unsigned>, std::shared_ptr<void>> shared_;
  size_t shared_bytes_ = 0;
  Requests global_requests_, shared_requests_;
};

}  // namespace simt
