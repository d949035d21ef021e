// For the checks of the CPU kernels of this architecture's baseline instruction set (NEON on aarch64) against
// plain loops, without torch's library: tools/neon.sh cross-compiles them and runs them in an emulator. To be
// included before the op's file.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

// The ops register themselves with torch, which is not there.
#undef STABLE_TORCH_LIBRARY_IMPL
#define PAHM_NOT_REGISTERED(line) [[maybe_unused]] static void not_registered_##line
#define PAHM_NOT_REGISTERED_AT(line) PAHM_NOT_REGISTERED(line)
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) \
  PAHM_NOT_REGISTERED_AT(__LINE__)(torch::stable::detail::StableLibrary & m)

namespace {

using c10::BFloat16;

std::mt19937 generator(0);
int failures = 0;

template <typename S>
std::vector<S> random_numbers(int64_t count, double low = -1, double high = 1) {
  std::uniform_real_distribution<double> distribution(low, high);
  std::vector<S> values(static_cast<size_t>(count));
  for (S& value : values) value = static_cast<S>(static_cast<float>(distribution(generator)));
  return values;
}

std::vector<int32_t> random_indices(int64_t count, int64_t limit) {
  std::uniform_int_distribution<int32_t> distribution(0, limit - 1);
  std::vector<int32_t> values(static_cast<size_t>(count));
  for (int32_t& value : values) value = distribution(generator);
  return values;
}

template <typename S>
void check_close(const char* what, const std::vector<S>& actual, const std::vector<double>& wanted) {
  const double tolerance = sizeof(S) == 8 ? 1e-12 : sizeof(S) == 4 ? 1e-4 : 4e-2;
  double worst = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i]) - wanted[i]) / (1 + std::abs(wanted[i]));
    worst = error > worst || error != error ? error : worst;
  }
  const bool good = worst <= tolerance && actual.size() == wanted.size();
  std::printf("%s %s, %zu bytes a number: off by %.1e\n", good ? "ok  " : "FAIL", what, sizeof(S), worst);
  failures += good ? 0 : 1;
}

// Runs `check` for each dtype; the exit status.
template <typename Check>
int run(const Check& check) {
  check(float{});
  check(double{});
  check(BFloat16{});
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
