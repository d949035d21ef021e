// What csrc/kernels/device.cuh gives kernels on a GPU, for kernels that run in simt.h.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::simt::Machine::get().thread_index())
#define blockIdx (::simt::Machine::get().block_index())
#define blockDim (::simt::Machine::get().block_size())
#define gridDim (::simt::Machine::get().grid_size())
#define __syncthreads() (::simt::Machine::get().block_barrier(::simt::Place::current()))
#define __syncwarp(mask) \
  static_cast<void>(::simt::Machine::get().meet(mask, 0, true, ::simt::Place::current()))

// An array of `count` elements of T that the threads of a block share.
#define PAHM_SHARED(T, name, count) \
  auto& name = ::simt::Machine::get().shared_array<::pahm::SharedArray<T>>(count, ::simt::Place::current())

// The same of the size that launch() was told: one a kernel.
#define PAHM_DYNAMIC_SHARED(T, name) \
  auto& name = ::simt::Machine::get().dynamic_array<::pahm::SharedArray<T>>(::simt::Place::current())

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline int __clz(uint32_t bits) { return std::countl_zero(bits); }

namespace pahm {

using simt::Place;

// ---- half precision: bits, and conversions that round to nearest even ----

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
inline float to_float(half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

template <typename S>
struct FromFloat {
  static S convert(S x) { return x; }
};
template <>
struct FromFloat<bfloat16> {
  static bfloat16 convert(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct FromFloat<half> {
  static half convert(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) return {0x7e00};
    const float size = std::fabs(x);
    if (size == 0) return {sign};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(size, &exponent);
    // The last place of a half near `size`: 2^(exponent - 11), and 2^-24 for the small ones.
    const int place = std::max(exponent - 11, -24);
    const float scaled = std::nearbyint(std::ldexp(size, -place));
    const auto count = static_cast<uint32_t>(scaled);
    if (place == -24 && count < 1024) return {static_cast<uint16_t>(sign | count)};
    const int shift = count == 2048 ? 1 : 0;
    return {static_cast<uint16_t>(sign | (place + shift + 25) << 10 | ((count >> shift) & 1023))};
  }
};
template <typename S, typename T>
S from_float(T x) {
  return FromFloat<S>::convert(x);
}

// tests/helpers/simt_kernels.py tells the compiler to fuse nothing.
inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }

// ---- global memory ----

template <typename T>
T load(const T* address, Place place = Place::current()) {
  simt::Machine::get().global_access(address, sizeof(T), alignof(T), simt::Access::load, place);
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <typename T>
void store(T* address, T value, Place place = Place::current()) {
  simt::Machine::get().global_access(address, sizeof(T), alignof(T), simt::Access::store, place);
  std::memcpy(address, &value, sizeof value);
}

template <typename T>
void atomic_add(T* address, T value, Place place = Place::current()) {
  static_assert(has_atomic_add<T>);
  simt::Machine::get().global_access(address, sizeof(T), alignof(T), simt::Access::atomic, place);
  *address += value;
}

// ---- shared memory ----

template <typename T>
class SharedArray {
 public:
  using Element = T;

  // One element, as an expression: its reads and writes are watched. `auto` would keep the reference, and
  // read later: what is kept so cannot be read.
  class Reference {
   public:
    Reference(SharedArray& array, size_t index, Place place) : array_(array), index_(index), place_(place) {}
    operator T() && { return array_.at(index_, 1, simt::Access::load, place_)[0]; }
    Reference& operator=(T value) && {
      array_.at(index_, 1, simt::Access::store, place_)[0] = value;
      return *this;
    }
    Reference& operator=(Reference&& other) && { return std::move(*this) = static_cast<T>(std::move(other)); }
    Reference& operator+=(T value) && {
      const T before = array_.at(index_, 1, simt::Access::load, place_)[0];
      return std::move(*this) = before + value;
    }

   private:
    SharedArray& array_;
    size_t index_;
    Place place_;
  };

  explicit SharedArray(size_t count) : values_(count), cells_(count) {}

  // `operator[]` takes one argument: the place comes with the index.
  struct Index {
    size_t value;
    Place place;
    template <typename I>
    Index(I i, Place p = Place::current()) : value(static_cast<size_t>(i)), place(p) {}
  };
  Reference operator[](Index index) { return {*this, index.value, index.place}; }

  // `count` elements that are touched together.
  T* at(size_t index, size_t count, simt::Access access, const Place& place) {
    auto& machine = simt::Machine::get();
    if (index + count > values_.size() || index + count < count) {
      machine.fail("shared memory is touched beyond its end", place);
    }
    if (index % count) machine.fail("a pack in shared memory begins at a misaligned index", place);
    machine.shared_access(&cells_[index], count, index * sizeof(T), count * sizeof(T),
                          count > 1 ? count * sizeof(T) : alignof(T), access, place);
    return &values_[index];
  }

 private:
  std::vector<T> values_;
  std::vector<simt::Cell> cells_;
};

template <int Count, typename T>
Pack<T, Count> load_shared(SharedArray<T>& array, int64_t i, Place place = Place::current()) {
  Pack<T, Count> pack;
  std::memcpy(&pack, array.at(static_cast<size_t>(i), Count, simt::Access::load, place), sizeof pack);
  return pack;
}

template <int Count, typename T>
void store_shared(SharedArray<T>& array, int64_t i, Pack<T, Count> pack, Place place = Place::current()) {
  std::memcpy(array.at(static_cast<size_t>(i), Count, simt::Access::store, place), &pack, sizeof pack);
}

inline void shared_atomic_min(SharedArray<int32_t>& array, int64_t i, int32_t value,
                              Place place = Place::current()) {
  int32_t& element = *array.at(static_cast<size_t>(i), 1, simt::Access::atomic, place);
  element = std::min(element, value);
}
inline void shared_atomic_max(SharedArray<int32_t>& array, int64_t i, int32_t value,
                              Place place = Place::current()) {
  int32_t& element = *array.at(static_cast<size_t>(i), 1, simt::Access::atomic, place);
  element = std::max(element, value);
}

// ---- between the lanes of a warp ----

template <typename T>
T shuffle(uint32_t mask, T value, int lane, Place place = Place::current()) {
  static_assert(sizeof(T) <= 8);
  auto& machine = simt::Machine::get();
  if (lane < 0 || lane >= simt::warp_size || !(mask >> lane & 1)) {
    machine.fail("a shuffle reads lane " + std::to_string(lane) + ", which its mask leaves out", place);
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t found = machine.meet(mask, bits, false, place)[static_cast<size_t>(lane)];
  std::memcpy(&value, &found, sizeof value);
  return value;
}

template <typename T>
T shuffle_xor(uint32_t mask, T value, int lanes, Place place = Place::current()) {
  return shuffle(mask, value, static_cast<int>(threadIdx.x % simt::warp_size) ^ lanes, place);
}

inline uint32_t ballot(uint32_t mask, bool predicate, Place place = Place::current()) {
  const auto& met = simt::Machine::get().meet(mask, predicate, false, place);
  uint32_t bits = 0;
  for (int lane = 0; lane < simt::warp_size; ++lane) {
    if (mask >> lane & 1) bits |= static_cast<uint32_t>(met[static_cast<size_t>(lane)]) << lane;
  }
  return bits;
}

// ---- the host's side ----

// As device.cuh has it on a GPU, and std::runtime_error where the kernel breaks a rule of the device.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, const Device& device,
            A&&... arguments) {
  check_grid(blocks);
  if (blocks == 0) return;
  const std::tuple<P...> copies(std::forward<A>(arguments)...);
  simt::Machine::get().launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
                              device.shared_limit, static_cast<uint64_t>(device.stream),
                              [&] { std::apply(kernel, copies); });
}

}  // namespace pahm
