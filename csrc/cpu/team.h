// Threads that share the chunks of one step after another of a frozen network.
//
// torch's own loops give each thread one share and wait for all. If another process takes a core, every loop
// waits for the thread that was on it. Here a thread takes the next small chunk when it is ready for one, and
// the caller waits only for chunks that were taken.
#pragma once

#include <cstdint>

namespace pahm {

// Runs a chunk of a step. `slot` is 0 for the caller, and below the number of threads.
class Chunks {
 public:
  virtual void run(int64_t step, int64_t chunk, int slot) noexcept = 0;

 protected:
  ~Chunks() = default;
};

// Whoever holds the team can share work with its threads. If another thread holds it, or `threads` is 1, the
// holder does all its work itself.
class TeamHold {
 public:
  explicit TeamHold(int threads);
  ~TeamHold();
  TeamHold(const TeamHold&) = delete;
  TeamHold& operator=(const TeamHold&) = delete;

  // All chunks of one step, on this thread and on the team's; they are done when it returns. step < 2^31,
  // count < 2^32.
  void share(Chunks& work, int64_t step, int64_t count);

 private:
  bool held_;
};

}  // namespace pahm
