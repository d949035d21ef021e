// A CUDA kernel on the CPU: grid, blocks, warps of 32, barriers, shuffles, shared memory, atomics. Each
// thread of a block is a fiber, blocks run one after the other. A kernel that breaks the rules of the device
// throws Failure:
//
// - a barrier that not every thread reaches, or that threads reach at different places;
// - a warp operation whose mask names a lane that does not come, or leaves out the caller or the source;
// - an access outside the buffers that Machine::allow() named, or at an address that its type does not allow;
// - memory that two threads touch, one of which writes, with no barrier in between: shared memory, and global
//   memory within a launch;
// - shared memory that is read before it is written, touched beyond its end, or more than the device has.
//
// Threads are picked at random from a seed, and also change over at memory accesses, so that a result that
// depends on their order shows as a difference between seeds.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "requests.h"

namespace simt {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What threadIdx and its like are: kernels here have one dimension.
struct Index {
  unsigned x;
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // Buffers that kernels may touch.
  void allow(const void* data, size_t bytes) { buffers_.allow(data, bytes); }
  void forget_buffers() { buffers_.forget(); }

  // Whether races for global memory are looked for.
  void look_for_races(bool yes) { look_for_races_ = yes; }

  const Counts& counts() const { return counts_; }
  void reset_counts() { counts_ = {}; }

  // Runs `kernel()` on every thread of the grid.
  template <typename Kernel>
  void launch(unsigned blocks, unsigned threads, int64_t shared_bytes, int64_t shared_limit, uint64_t seed,
              const Kernel& kernel) {
    if (threads == 0 || threads > 1024 || threads % warp_size) {
      throw Failure("a block has " + std::to_string(threads) + " threads, not whole warps up to 1024");
    }
    random_ = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
    for (int i = 0; i < 8; ++i) random();
    blocks_ = blocks;
    block_threads_ = threads;
    dynamic_bytes_ = shared_bytes;
    shared_limit_ = shared_limit;
    body_ = [](const void* k) { (*static_cast<const Kernel*>(k))(); };
    kernel_ = &kernel;
    buffers_.start_launch();
    ++counts_.launches;
    counts_.blocks += blocks;
    counts_.threads = std::max<int64_t>(counts_.threads, threads);
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    for (unsigned i = blocks; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    try {
      for (const unsigned block : order) run_block(block);
    } catch (...) {
      for (const auto& thread : threads_) thread->fiber->restart();
      current_ = nullptr;
      throw;
    }
  }

  // ---- what kernels call ----

  Index thread_index() const { return {static_cast<unsigned>(current_->index)}; }
  Index block_index() const { return {block_}; }
  Index block_size() const { return {block_threads_}; }
  Index grid_size() const { return {blocks_}; }

  void block_barrier(const Place& place) { wait(State::block_barrier, place, 0, 0); }

  // Meets the lanes of `mask`; then returns what each of them brought.
  const std::array<uint64_t, warp_size>& meet(uint32_t mask, uint64_t value, bool orders_memory,
                                              const Place& place) {
    const int lane = current_->index % warp_size;
    if (!(mask >> lane & 1)) fail("lane " + std::to_string(lane) + " is not in its own mask", place);
    wait(orders_memory ? State::warp_barrier : State::warp_exchange, place, mask, value);
    return *current_->met;
  }

  void global_access(const void* address, size_t bytes, size_t alignment, Access access, const Place& place) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    const int number = sites_.number(place, bytes, std::min<size_t>(alignment, 16), false);
    const int buffer = buffers_.find(begin, bytes, sites_[number].buffer);
    if (buffer < 0) fail("an access of " + std::to_string(bytes) + " bytes outside every buffer", place);
    sites_[number].buffer = buffer;
    if (begin % alignment)
      fail("an access of " + std::to_string(bytes) + " bytes at a misaligned address", place);
    const bool store = access != Access::load;
    (store ? counts_.stored_bytes : counts_.loaded_bytes) += static_cast<int64_t>(bytes);
    counts_.atomics += access == Access::atomic;
    const Buffers::Fresh fresh = buffers_.mark(buffer, begin, bytes, store);
    counts_.dram_bytes += fresh.launch * static_cast<int64_t>(sector_bytes);
    counts_.l2_bytes += fresh.block * static_cast<int64_t>(sector_bytes);
    if (look_for_races_) {
      const Moment now = order_.now(current_->index);
      buffers_.for_cells(buffer, begin, bytes, std::min<size_t>(alignment, 16), [&](Cell& cell) {
        if (bytes == 16 && access == Access::load && cell.stored) {
          fail("the read-only cache is asked for what this launch wrote", place);
        }
        touch("global", cell, access, now, place);
      });
    }
    requests_.add(number, current_->index, begin, counts_);
    maybe_yield();
  }

  // Elements of an array in shared memory, from byte `offset` of the array on.
  void shared_access(Cell* cells, size_t count, uintptr_t offset, size_t bytes, size_t alignment,
                     Access access, const Place& place) {
    const Moment now = order_.now(current_->index);
    for (size_t i = 0; i < count; ++i) {
      cells[i].enter(block_serial_);
      if (access != Access::store && !cells[i].stored) fail("shared memory is read that nobody wrote", place);
      touch("shared", cells[i], access, now, place);
    }
    counts_.shared_atomics += access == Access::atomic;
    const int number = sites_.number(place, bytes, std::min<size_t>(alignment, 16), true);
    requests_.add(number, current_->index, offset, counts_);
    maybe_yield();
  }

  // An array of shared memory: one a block and place.
  template <typename Array>
  Array& shared_array(size_t count, const Place& place) {
    auto& slot = shared_[sites_.number(place, 0, 0, true)];
    if (!slot) {
      slot = std::make_shared<Array>(count);
      static_bytes_ += static_cast<int64_t>((sizeof(typename Array::Element) * count + 15) / 16 * 16);
      if (static_bytes_ > most_static_bytes) {
        fail("arrays of fixed size take " + std::to_string(static_bytes_) + " bytes of shared memory", place);
      }
      check_shared_bytes(place);
    }
    return *static_cast<Array*>(slot.get());
  }

  // The shared memory whose size the launch gives.
  template <typename Array>
  Array& dynamic_array(const Place& place) {
    if (!dynamic_) {
      dynamic_ =
          std::make_shared<Array>(static_cast<size_t>(dynamic_bytes_) / sizeof(typename Array::Element));
      dynamic_site_ = sites_.number(place, 0, 0, true);
    }
    if (dynamic_site_ != sites_.number(place, 0, 0, true)) fail("dynamic shared memory has two names", place);
    return *static_cast<Array*>(dynamic_.get());
  }

  [[noreturn]] void fail(const std::string& what, const Place& place) const {
    const std::string path = place.file_name();
    throw Failure(what + " (thread " + std::to_string(current_->index) + " of block " +
                  std::to_string(block_) + ", " + path.substr(path.rfind('/') + 1) + ":" +
                  std::to_string(place.line()) + ")");
  }

 private:
  enum class State { ready, block_barrier, warp_barrier, warp_exchange, done };

  struct Thread {
    int index = 0;
    State state = State::ready;
    Place place;
    int site = 0;
    uint32_t mask = 0;
    uint64_t value = 0;
    std::array<uint64_t, warp_size> gathered;  // what its lanes brought, where it is the first of them
    const std::array<uint64_t, warp_size>* met = nullptr;
    std::unique_ptr<Fiber> fiber;
  };

  static constexpr int64_t most_static_bytes = 48 * 1024;

  Machine() : requests_(sites_) {}

  // A fiber runs its thread of one block after the other.
  static void run_thread(void* argument) {
    auto* const thread = static_cast<Thread*>(argument);
    Machine& machine = get();
    for (;;) {
      try {
        machine.body_(machine.kernel_);
      } catch (...) {
        machine.error_ = std::current_exception();
      }
      thread->state = State::done;
      thread->fiber->suspend();
    }
  }

  void run_block(unsigned block) {
    block_ = block;
    ++block_serial_;
    shared_.clear();
    dynamic_.reset();
    static_bytes_ = 0;
    error_ = nullptr;
    buffers_.start_block();
    order_.start_block(static_cast<int>(block_threads_));
    requests_.start_block(static_cast<int>(block_threads_));
    while (threads_.size() < block_threads_) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->index = static_cast<int>(threads_.size()) - 1;
      threads_.back()->fiber = std::make_unique<Fiber>(&Machine::run_thread, threads_.back().get());
    }
    ready_.clear();
    for (unsigned i = 0; i < block_threads_; ++i) wake(*threads_[i]);
    current_ = threads_[0].get();
    check_shared_bytes(Place::current());
    for (unsigned running = block_threads_; running > 0;) {
      if (ready_.empty()) release();
      const size_t pick = random() % ready_.size();
      current_ = ready_[pick];
      current_->fiber->resume();
      if (error_) std::rethrow_exception(error_);
      if (current_->state == State::ready) continue;
      running -= current_->state == State::done;
      ready_[pick] = ready_.back();
      ready_.pop_back();
    }
    current_ = nullptr;
    requests_.finish_block(counts_);
  }

  void wake(Thread& thread) {
    thread.state = State::ready;
    ready_.push_back(&thread);
  }

  // Nobody can run: lets those go on who have met, or says why nobody can.
  void release() {
    for (unsigned first = 0; first < block_threads_; first += warp_size) {
      for (unsigned i = first; i < first + warp_size; ++i) {
        Thread& thread = *threads_[i];
        if (thread.state == State::warp_barrier || thread.state == State::warp_exchange) {
          release_lanes(thread, first);
        }
      }
    }
    if (!ready_.empty()) return;
    Thread* waiting = nullptr;
    bool ended = false;
    for (unsigned i = 0; i < block_threads_; ++i) {
      Thread* const thread = threads_[i].get();
      if (thread->state == State::done) {
        ended = true;
      } else if (waiting && waiting->site != thread->site) {
        current_ = thread;
        fail("threads wait at different barriers", thread->place);
      } else {
        waiting = thread;
      }
    }
    if (ended) {
      current_ = waiting;
      fail("a barrier is not reached by a thread that has ended", waiting->place);
    }
    order_.block_barrier();
    for (unsigned i = 0; i < block_threads_; ++i) wake(*threads_[i]);
  }

  // The lanes that a thread meets, of the warp from thread `first` on.
  void release_lanes(Thread& thread, unsigned first) {
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (!(thread.mask >> lane & 1)) continue;
      const Thread& other = *threads_[first + lane];
      if (other.state != thread.state || other.mask != thread.mask || other.site != thread.site) {
        current_ = &thread;
        fail("a warp operation waits for lane " + std::to_string(lane) + ", which its mask names and which " +
                 (other.state == State::done ? "has ended" : "is elsewhere"),
             thread.place);
      }
      thread.gathered[lane] = other.value;
    }
    if (thread.state == State::warp_barrier)
      order_.warp_barrier(static_cast<int>(first) / warp_size, thread.mask);
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (!(thread.mask >> lane & 1)) continue;
      threads_[first + lane]->met = &thread.gathered;
      wake(*threads_[first + lane]);
    }
  }

  void wait(State state, const Place& place, uint32_t mask, uint64_t value) {
    current_->state = state;
    current_->place = place;
    current_->site = sites_.number(place, 0, 0, false);
    current_->mask = mask;
    current_->value = value;
    current_->fiber->suspend();
  }

  void maybe_yield() {
    if (random() % 8 == 0) current_->fiber->suspend();
  }

  // xorshift64*
  uint64_t random() {
    random_ ^= random_ >> 12;
    random_ ^= random_ << 25;
    random_ ^= random_ >> 27;
    return random_ * 0x2545f4914f6cdd1du >> 16;
  }

  void touch(const char* memory, Cell& cell, Access access, const Moment& now, const Place& place) const {
    const Race race = order_.touch(cell, access, now);
    if (race == Race::none) return;
    const std::string name = std::string(memory) + " memory";
    fail(race == Race::overwrites ? name + " is overwritten that another thread may yet read"
                                  : "two threads touch " + name + ", one writes, no barrier between",
         place);
  }

  void check_shared_bytes(const Place& place) {
    const int64_t bytes = static_bytes_ + dynamic_bytes_;
    counts_.shared_bytes = std::max(counts_.shared_bytes, bytes);
    if (bytes > shared_limit_) {
      fail("a block asks for " + std::to_string(bytes) + " bytes of shared memory, the device has " +
               std::to_string(shared_limit_),
           place);
    }
  }

  Sites sites_;
  Buffers buffers_;
  Order order_;
  Requests requests_;
  Counts counts_;
  bool look_for_races_ = true;

  // The launch.
  void (*body_)(const void*) = nullptr;
  const void* kernel_ = nullptr;
  unsigned blocks_ = 0, block_threads_ = 0;
  int64_t dynamic_bytes_ = 0, shared_limit_ = 0;
  uint64_t random_ = 1;

  // The block.
  unsigned block_ = 0;
  uint32_t block_serial_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> ready_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  std::map<int, std::shared_ptr<void>> shared_;
  std::shared_ptr<void> dynamic_;
  int dynamic_site_ = 0;
  int64_t static_bytes_ = 0;
};

}  // namespace simt
