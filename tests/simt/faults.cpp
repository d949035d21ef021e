// Kernels with a planted fault each, and the same without it: run(name, seed) says what the machine said.
#include <array>
#include <bit>
#include <cstdio>
#include <string>

#include "kernels/device.cuh"

namespace {

constexpr int threads = 128;
constexpr uint32_t full = 0xffffffff;

// Reverses a block by way of shared memory.
void reverse(const float* in, float* out, bool barrier) {
  PAHM_SHARED(float, tile, threads);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = pahm::load(in + i);
  if (barrier) __syncthreads();
  pahm::store(out + i, static_cast<float>(tile[threads - 1 - i]));
}

// Adds up a block in rounds; a round's reads and writes want a barrier between them.
void tree_sum(const float* in, float* out, bool barrier) {
  PAHM_SHARED(float, part, threads);
  const int i = static_cast<int>(threadIdx.x);
  part[i] = pahm::load(in + i);
  __syncthreads();
  for (int width = threads / 2; width > 0; width /= 2) {
    if (i < width) part[i] += part[i + width];
    if (barrier || width == 1) __syncthreads();
  }
  if (i == 0) pahm::store(out, static_cast<float>(part[0]));
}

// Each thread reads what its neighbour has just written. A warp's own barrier is enough where they share a
// warp.
void neighbour(float* out, int barrier, int distance) {
  PAHM_SHARED(float, tile, threads);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = static_cast<float>(i);
  if (barrier == 1) __syncwarp(full);
  if (barrier == 2) __syncthreads();
  pahm::store(out + i, static_cast<float>(tile[i ^ distance]));
}

// Many threads write one element.
void crowd(float* out, bool one) {
  PAHM_SHARED(float, tile, 1);
  if (!one || threadIdx.x == 5) tile[0] = 3.0f;
  __syncthreads();
  pahm::store(out + threadIdx.x, static_cast<float>(tile[0]));
}

// All read one element, then a thread of warp 1 writes it: its own warp's barrier does not hold the others
// back.
void overwrite(float* out, bool block_barrier) {
  PAHM_SHARED(float, tile, 1);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) tile[0] = 3.0f;
  __syncthreads();
  pahm::store(out + i, static_cast<float>(tile[0]));
  if (block_barrier) __syncthreads();
  if (i / 32 == 1) __syncwarp(full);
  if (i == 32) tile[0] = 4.0f;
}

// Every thread adds to one number, without an atomic: no shared memory, only the order of threads shows it.
void count_up(float* out, bool atomic) {
  if (atomic) {
    pahm::atomic_add(out, 1.0f);
  } else {
    pahm::store(out, pahm::load(out) + 1.0f);
  }
}

// Half of the block does not come to the barrier; or comes to another.
void divergent(float* out, int kind) {
  const bool upper = threadIdx.x >= threads / 2;
  if (kind == 0) {
    __syncthreads();
  } else if (kind == 1) {
    if (upper) return;
    __syncthreads();
  } else if (upper) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  pahm::store(out + threadIdx.x, 1.0f);
}

// A sum over a warp; `mask` may leave lanes out, or name lanes that do not come.
void warp_sum(const float* in, float* out, uint32_t mask, bool lower_half_only) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float value = pahm::load(in + threadIdx.x);
  if (lower_half_only && lane >= 16) return;
  const int first = lower_half_only ? 8 : 16;
  for (int lanes = first; lanes > 0; lanes /= 2) value += pahm::shuffle_xor(mask, value, lanes);
  if (lane == 0) pahm::store(out + threadIdx.x / 32, value);
}

// Counts the lanes of a warp; `mask` may leave out those who ask.
void vote(float* out, uint32_t mask) {
  const uint32_t found = pahm::ballot(mask, threadIdx.x % 2 == 0);
  pahm::store(out + threadIdx.x, static_cast<float>(std::popcount(found)));
}

void shift(const float* in, float* out, int by) {
  pahm::store(out + threadIdx.x, pahm::load(in + threadIdx.x + by));
}

void unwritten(float* out, bool write) {
  PAHM_SHARED(float, tile, threads);
  if (write || threadIdx.x % 2 == 0) tile[threadIdx.x] = 2.0f;
  __syncthreads();
  pahm::store(out + threadIdx.x, static_cast<float>(tile[threadIdx.x]));
}

// Columns of a square tile: 32 words apart they all lie in one bank.
void column(float* out, int pitch) {
  PAHM_SHARED(float, tile, 32 * 33);
  const int i = static_cast<int>(threadIdx.x);
  for (int k = i; k < 32 * 33; k += threads) tile[k] = static_cast<float>(k);
  __syncthreads();
  pahm::store(out + i, static_cast<float>(tile[i % 32 * pitch]));
}

void strided(const float* in, float* out, int by) {
  pahm::store(out + threadIdx.x, pahm::load(in + threadIdx.x % 32 * by));
}

std::string run(const std::string& name, uint64_t seed) {
  // Where a GPU's allocations begin.
  alignas(256) static std::array<float, 1024> in;
  alignas(256) static std::array<float, threads> out;
  out.fill(0);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  auto& machine = simt::Machine::get();
  machine.forget_buffers();
  machine.allow(in.data(), threads * sizeof(float));
  if (name.starts_with("strided")) machine.allow(in.data(), in.size() * sizeof(float));
  machine.allow(out.data(), out.size() * sizeof(float));
  const float* x = in.data();
  float* y = out.data();
  const auto launch = [&](const auto& kernel) { machine.launch(1, threads, seed, kernel); };
  try {
    if (name == "reverse") launch([&] { reverse(x, y, true); });
    if (name == "reverse, no barrier") launch([&] { reverse(x, y, false); });
    if (name == "tree_sum") launch([&] { tree_sum(x, y, true); });
    if (name == "tree_sum, missing barrier") launch([&] { tree_sum(x, y, false); });
    if (name == "neighbour") launch([&] { neighbour(y, 2, 32); });
    if (name == "neighbour in the warp") launch([&] { neighbour(y, 1, 1); });
    if (name == "neighbour, no barrier") launch([&] { neighbour(y, 0, 1); });
    if (name == "neighbour, warp barrier only") launch([&] { neighbour(y, 1, 32); });
    if (name == "overwrite") launch([&] { overwrite(y, true); });
    if (name == "overwrite, warp barrier only") launch([&] { overwrite(y, false); });
    if (name == "crowd") launch([&] { crowd(y, true); });
    if (name == "crowd, all") launch([&] { crowd(y, false); });
    if (name == "count_up") launch([&] { count_up(y, true); });
    if (name == "count_up, race") launch([&] { count_up(y, false); });
    if (name == "barrier") launch([&] { divergent(y, 0); });
    if (name == "barrier, half has ended") launch([&] { divergent(y, 1); });
    if (name == "barrier, two places") launch([&] { divergent(y, 2); });
    if (name == "warp_sum") launch([&] { warp_sum(x, y, full, false); });
    if (name == "warp_sum of half") launch([&] { warp_sum(x, y, 0x0000ffff, true); });
    if (name == "warp_sum, absent lanes") launch([&] { warp_sum(x, y, full, true); });
    if (name == "warp_sum, lane left out") launch([&] { warp_sum(x, y, 0x0000ffff, false); });
    if (name == "vote") launch([&] { vote(y, full); });
    if (name == "vote, not asked") launch([&] { vote(y, 0x7fffffff); });
    if (name == "shift") launch([&] { shift(x, y, 0); });
    if (name == "shift, off by one") launch([&] { shift(x, y, 1); });
    if (name == "unwritten") launch([&] { unwritten(y, true); });
    if (name == "unwritten, half") launch([&] { unwritten(y, false); });
    if (name == "column") launch([&] { column(y, 33); });
    if (name == "column, conflict") launch([&] { column(y, 32); });
    if (name == "strided") launch([&] { strided(x, y, 1); });
    if (name == "strided, far") launch([&] { strided(x, y, 8); });
  } catch (const simt::Failure& failure) {
    return std::string("failed: ") + failure.what();
  }
  const simt::Counts& counts = machine.counts();
  double sum = 0;
  for (const float v : out) sum += v;
  return "sum " + std::to_string(sum) + ", first " + std::to_string(out[0]) + ", conflicts " +
         std::to_string(counts.bank_conflicts) + ", sectors " + std::to_string(counts.sectors) + " of " +
         std::to_string(counts.ideal_sectors) + ", atomics " + std::to_string(counts.atomics);
}

}  // namespace

int main(int argc, char** argv) {
  for (int seed = 0; seed < (argc > 2 ? std::stoi(argv[2]) : 1); ++seed) {
    std::printf("%s\n", run(argv[1], static_cast<uint64_t>(seed)).c_str());
  }
  return 0;
}
