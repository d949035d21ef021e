#include "cpu/team.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

namespace pahm {
namespace {

constexpr int most_workers = 255;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// `ticket` holds the chunks of the current step that nobody has taken yet (low half) and a number that
// differs from step to step (high half). All that an idle thread touches is here and lives for ever, so that
// the caller need not wait for threads that took nothing.
struct Team {
  std::mutex mutex;
  std::atomic<uint64_t> ticket{0};
  std::atomic<Chunks*> work{nullptr};
  std::atomic<int64_t> step{0};
  std::atomic<uint32_t> done{0};
  std::atomic<int> allowed{0}, asleep{0};
  std::atomic<bool> caller_asleep{false};
  std::atomic<uint32_t> alarm{0};
  uint64_t steps = 0;
  int workers = 0;
  pid_t process = 0;

  // Takes and runs one chunk.
  bool take(int slot) {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    // Read after the ticket: a worker that the present holder did not ask for must not take its chunks.
    while (static_cast<uint32_t>(seen) != 0 && slot <= allowed.load(std::memory_order_relaxed)) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      // The step cannot end before this chunk is done, so these still belong to it.
      work.load(std::memory_order_relaxed)
          ->run(step.load(std::memory_order_relaxed), static_cast<uint32_t>(seen) - 1, slot);
      done.fetch_add(1);
      if (caller_asleep.load()) done.notify_one();
      return true;
    }
    return false;
  }

  // A worker looks for chunks for a short while, which covers the pauses between steps, and then sleeps.
  void serve(int number) {
    using Clock = std::chrono::steady_clock;
    constexpr auto patience = std::chrono::microseconds(100);
    auto idle_since = Clock::now();
    while (true) {
      if (number < allowed.load(std::memory_order_relaxed) && take(number + 1)) {
        idle_since = Clock::now();
        continue;
      }
      for (int i = 0; i < 16; ++i) pause();
      if (Clock::now() - idle_since < patience) continue;
      const uint32_t rung = alarm.load();
      asleep.fetch_add(1);
      if (number >= allowed.load() || static_cast<uint32_t>(ticket.load()) == 0) alarm.wait(rung);
      asleep.fetch_sub(1);
      idle_since = Clock::now();
    }
  }

  void grow(int wanted) {
    // A forked child has none of its parent's threads.
    if (process != getpid()) {
      process = getpid();
      workers = 0;
      asleep = 0;
    }
    try {
      for (; workers < wanted && workers < most_workers; ++workers) {
        std::thread([this, number = workers] { serve(number); }).detach();
      }
    } catch (const std::system_error&) {
      // The system gives no more threads. The caller does what they would have done.
    }
  }

  // A thread that took a chunk may have lost its core. Sleeping leaves it this one.
  void wait_for(uint32_t count) {
    for (int i = 0; i < 1000; ++i) {
      if (done.load(std::memory_order_acquire) == count) return;
      pause();
    }
    caller_asleep = true;
    for (uint32_t now = done.load(); now != count; now = done.load()) done.wait(now);
    caller_asleep = false;
  }
};

// Never destroyed, because its threads outlive static destructors.
Team& team() {
  static Team* const shared = new Team;
  return *shared;
}

}  // namespace

TeamHold::TeamHold(int threads) : held_(threads > 1 && team().mutex.try_lock()) {
  if (!held_) return;
  team().grow(threads - 1);
  team().allowed = threads - 1;
}

TeamHold::~TeamHold() {
  if (held_) team().mutex.unlock();
}

void TeamHold::share(Chunks& work, int64_t step, int64_t count) {
  if (!held_ || count == 1) {
    for (int64_t chunk = 0; chunk < count; ++chunk) work.run(step, chunk, 0);
    return;
  }
  Team& t = team();
  t.work.store(&work, std::memory_order_relaxed);
  t.step.store(step, std::memory_order_relaxed);
  t.done.store(0, std::memory_order_relaxed);
  t.ticket.store(++t.steps << 32 | static_cast<uint64_t>(count));
  if (t.asleep.load() > 0) {
    t.alarm.fetch_add(1);
    t.alarm.notify_all();
  }
  while (t.take(0)) {
  }
  t.wait_for(static_cast<uint32_t>(count));
}

}  // namespace pahm
