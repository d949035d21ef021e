// Uninitialised working memory, aligned to a cache line and freed at the end of its scope.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace pahm {

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), alignment))) {}
  ~Scratch() { ::operator delete(data_, alignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_;
};

}  // namespace pahm
