// What each file of kernels that Python calls includes, once.
#pragma once

#include <cstddef>
#include <exception>
#include <string>

#include "cases.h"
#include "kernels/device.cuh"

// Calls f with a zero of float32, float64, float16 or bfloat16: 0 to 3.
template <typename F>
void for_dtype(int dtype, const F& f) {
  if (dtype == 0) f(float{});
#ifdef SIMT_FLOAT32_ONLY  // A quarter of the kernels, and of the time that a compiler takes.
  if (dtype != 0) throw std::invalid_argument("this program has the kernels for float32 only");
#else
  if (dtype == 1) f(double{});
  if (dtype == 2) f(pahm::half{});
  if (dtype == 3) f(pahm::bfloat16{});
#endif
}

// A device that runs threads in an order of its own for each seed. 227 KiB: what an H100 gives a block.
inline pahm::Device device(uint64_t seed, int processors = 4, int64_t shared_limit = 227 * 1024) {
  return {static_cast<int>(seed), processors, shared_limit};
}

// Null, or what the machine or the launch complained of.
template <typename F>
const char* run(simt::Counts* counts, const F& launch) {
  static std::string complaint;
  simt::Machine& machine = simt::Machine::get();
  machine.reset_counts();
  try {
    launch();
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
  *counts = machine.counts();
  return nullptr;
}

inline void allow(const simt::Argument& a) {
  if (a.kind == simt::Kind::tensor) {
    simt::Machine::get().allow(a.data, static_cast<size_t>(a.length));
  } else if (a.kind == simt::Kind::tensors) {
    for (int64_t i = 0; i < a.length; ++i) allow(static_cast<const simt::Argument*>(a.data)[i]);
  }
}

extern "C" const char* simt_call(const char* name, const simt::Argument* arguments, int64_t count,
                                 uint64_t seed, int races, simt::Counts* counts) {
  static std::string complaint;
  simt::Machine& machine = simt::Machine::get();
  machine.forget_buffers();
  machine.look_for_races(races != 0);
  for (int64_t i = 0; i < count; ++i) allow(arguments[i]);
  try {
    const auto found = simt::cases().find(name);
    if (found == simt::cases().end()) throw std::invalid_argument(std::string("no case is called ") + name);
    simt::Call call(name, arguments, count);
    return found->second(call, seed, counts);
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
}
