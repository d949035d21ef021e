// What csrc/kernels/device.cuh gives kernels on a GPU, for kernels that run in simt.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
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

// ---- global memory ----

template <typename T>
T load(const T* address, Place place = Place::current()) {
  simt::Machine::get().global_access(address, sizeof(T), false, false, place);
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <typename T>
void store(T* address, T value, Place place = Place::current()) {
  simt::Machine::get().global_access(address, sizeof(T), true, false, place);
  std::memcpy(address, &value, sizeof value);
}

template <typename T>
void atomic_add(T* address, T value, Place place = Place::current()) {
  simt::Machine::get().global_access(address, sizeof(T), true, true, place);
  *address += value;
}

// ---- shared memory ----

template <typename T>
class SharedArray {
 public:
  using Element = T;

  // One element, as an expression: its reads and writes are watched.
  class Reference {
   public:
    Reference(SharedArray& array, size_t index, Place place) : array_(array), index_(index), place_(place) {}
    operator T() const {
      touch(false);
      return array_.values_[index_];
    }
    Reference& operator=(T value) {
      touch(true);
      array_.values_[index_] = value;
      return *this;
    }
    Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }
    Reference& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

   private:
    void touch(bool store) const {
      if (index_ >= array_.values_.size()) {
        simt::Machine::get().fail("shared memory is touched beyond its end", place_);
      }
      simt::Machine::get().shared_access(array_.cells_[index_], array_.offset_ + index_ * sizeof(T),
                                         sizeof(T), store, place_);
    }
    SharedArray& array_;
    size_t index_;
    Place place_;
  };

  SharedArray(size_t count, size_t offset) : values_(count), cells_(count), offset_(offset) {}

  // `operator[]` takes one argument: the place comes with the index.
  struct Index {
    size_t value;
    Place place;
    template <typename I>
    Index(I i, Place p = Place::current()) : value(static_cast<size_t>(i)), place(p) {}
  };
  Reference operator[](Index index) { return {*this, index.value, index.place}; }

 private:
  std::vector<T> values_;
  std::vector<simt::Machine::Cell> cells_;
  size_t offset_;
};

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

}  // namespace pahm
