// What the libraries of kernels that Python calls have in common.
#pragma once

#include <string>

#include "kernels/device.cuh"

extern "C" void allow(const void* data, size_t bytes) { simt::Machine::get().allow(data, bytes); }
extern "C" void forget_buffers() { simt::Machine::get().forget_buffers(); }

// Calls f with a zero of float32, float64, float16 or bfloat16: 0 to 3.
template <typename F>
void for_dtype(int dtype, const F& f) {
  if (dtype == 0) f(float{});
  if (dtype == 1) f(double{});
  if (dtype == 2) f(pahm::half{});
  if (dtype == 3) f(pahm::bfloat16{});
}

// Null, or what the machine complained of.
template <typename F>
const char* run(simt::Counts* counts, const F& launch) {
  static std::string complaint;
  try {
    launch();
  } catch (const simt::Failure& failure) {
    complaint = failure.what();
    return complaint.c_str();
  }
  *counts = simt::Machine::get().counts();
  return nullptr;
}
