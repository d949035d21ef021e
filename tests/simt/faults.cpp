// Kernels with and without a planted fault each, for tests/simt/test_simt.py.
#include "kernel_case.h"

namespace {

using pahm::load;
using pahm::Pack;
using pahm::store;

constexpr uint32_t full = 0xffffffff;

// ---- shared memory ----

// Reverses a block by way of shared memory.
__global__ void reverse(const float* in, float* out, bool barrier) {
  PAHM_SHARED(float, tile, threads);
  const int i = threadIdx.x;
  tile[i] = load(in + i);
  if (barrier) __syncthreads();
  store(out + i, static_cast<float>(tile[threads - 1 - i]));
}
KERNEL(reverse);

// Adds up a block in rounds; a round's reads and writes want a barrier between them.
__global__ void tree_sum(const float* in, float* out, bool barrier) {
  PAHM_SHARED(float, part, threads);
  const int i = threadIdx.x;
  part[i] = load(in + i);
  __syncthreads();
  for (int width = threads / 2; width > 0; width /= 2) {
    if (i < width) part[i] += part[i + width];
    if (barrier || width == 1) __syncthreads();
  }
  if (i == 0) store(out, static_cast<float>(part[0]));
}
KERNEL(tree_sum);

// Barriers between what a thread writes and what another reads: none, of a warp, of half a warp, of the
// block.
__device__ void meet(int barrier) {
  if (barrier == 1) __syncwarp(full);
  if (barrier == 2) __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000);
  if (barrier == 3) __syncthreads();
}

// Each thread reads what the thread `distance` away has just written.
__global__ void neighbour(float* out, int barrier, int distance) {
  PAHM_SHARED(float, tile, threads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = static_cast<float>(i);
  meet(barrier);
  store(out + i, static_cast<float>(tile[i ^ distance]));
}
KERNEL(neighbour);

// Each thread reads an element, then another writes it.
__global__ void overwrite(float* out, int barrier, int distance) {
  PAHM_SHARED(float, tile, threads);
  const int i = threadIdx.x;
  tile[i] = 3.0f;
  __syncthreads();
  store(out + i, static_cast<float>(tile[i]));
  meet(barrier);
  tile[i ^ distance] = 4.0f;
}
KERNEL(overwrite);

// All read one element, then a thread of warp 1 writes it: its own warp's barrier does not hold the others
// back.
__global__ void overwrite_one(float* out, bool block_barrier) {
  PAHM_SHARED(float, tile, 1);
  const int i = threadIdx.x;
  if (i == 0) tile[0] = 3.0f;
  __syncthreads();
  store(out + i, static_cast<float>(tile[0]));
  if (block_barrier) __syncthreads();
  if (i / 32 == 1) __syncwarp(full);
  if (i == 32) tile[0] = 4.0f;
}
KERNEL(overwrite_one);

// The lanes of a warp read one element, then one of them writes it.
__global__ void overwrite_lane(float* out, bool barrier) {
  PAHM_SHARED(float, tile, 1);
  const int i = threadIdx.x;
  if (i == 0) tile[0] = 3.0f;
  __syncthreads();
  if (i >= 32) return;
  store(out + i, static_cast<float>(tile[0]));
  if (barrier) __syncwarp(full);
  if (i == 5) tile[0] = 4.0f;
}
KERNEL(overwrite_lane);

// Many threads write one element.
__global__ void crowd(float* out, bool all) {
  PAHM_SHARED(float, tile, 1);
  if (all || threadIdx.x == 5) tile[0] = 3.0f;
  __syncthreads();
  store(out + threadIdx.x, static_cast<float>(tile[0]));
}
KERNEL(crowd);

__global__ void unwritten(float* out, bool write) {
  PAHM_SHARED(float, tile, threads);
  if (write || threadIdx.x % 2 == 0) tile[threadIdx.x] = 2.0f;
  __syncthreads();
  store(out + threadIdx.x, static_cast<float>(tile[threadIdx.x]));
}
KERNEL(unwritten);

// Writes `written` elements of dynamic shared memory; each thread reads the one `by` behind its own.
__global__ void dynamic(float* out, int written, int by) {
  PAHM_DYNAMIC_SHARED(float, tile);
  const int i = threadIdx.x;
  for (int k = i; k < written; k += threads) tile[k] = static_cast<float>(k);
  __syncthreads();
  store(out + i, static_cast<float>(tile[i + by]));
}
KERNEL(dynamic);

// The same in packs of four.
__global__ void packs(float* out, int written, int by) {
  PAHM_DYNAMIC_SHARED(float, tile);
  const int i = threadIdx.x;
  if (4 * i < written) {
    const float k = static_cast<float>(4 * i);
    pahm::store_shared(tile, 4 * i, Pack<float, 4>{{k, k + 1, k + 2, k + 3}});
  }
  __syncthreads();
  if (i >= 32) return;
  const auto pack = pahm::load_shared<4>(tile, 4 * i + by);
  for (int k = 0; k < 4; ++k) store(out + 4 * i + k, pack.values[k]);
}
KERNEL(packs);

__global__ void two_names(float* out, bool same) {
  if (same) return store(out + threadIdx.x, 1.0f);
  PAHM_DYNAMIC_SHARED(float, a);
  PAHM_DYNAMIC_SHARED(float, b);
  a[threadIdx.x] = 1.0f;
  b[threadIdx.x] = 2.0f;
}
KERNEL(two_names);

// The smallest and the largest of `in`.
__global__ void extremes(const int32_t* in, int32_t* out, bool first_value, bool barrier) {
  PAHM_SHARED(int32_t, found, 2);
  const int i = threadIdx.x;
  if (i < 2 && first_value) found[i] = load(in);
  __syncthreads();
  pahm::shared_atomic_min(found, 0, load(in + i));
  pahm::shared_atomic_max(found, 1, load(in + i));
  if (barrier) __syncthreads();
  if (i < 2) store(out + i, static_cast<int32_t>(found[i]));
}
KERNEL(extremes);

// Columns of a square tile: 32 words apart they all lie in one bank.
__global__ void column(float* out, int pitch) {
  PAHM_SHARED(float, tile, 32 * 33);
  const int i = threadIdx.x;
  for (int k = i; k < 32 * 33; k += threads) tile[k] = static_cast<float>(k);
  __syncthreads();
  store(out + i, static_cast<float>(tile[i % 32 * pitch]));
}
KERNEL(column);

// Packs of four, `pitch` elements apart: a quarter of a warp passes at a time.
__global__ void pack_column(float* out, int pitch) {
  PAHM_SHARED(float, tile, 32 * 36);
  const int i = threadIdx.x;
  for (int k = i; k < 32 * 36; k += threads) tile[k] = static_cast<float>(k);
  __syncthreads();
  store(out + i, pahm::load_shared<4>(tile, i % 32 * pitch).values[0]);
}
KERNEL(pack_column);

// Elements of three words: a GPU moves them in three pieces.
struct Three {
  float a, b, c;
};
__global__ void threes(float* out) {
  PAHM_SHARED(Three, tile, threads);
  const int i = threadIdx.x;
  tile[i] = Three{1, 2, 3};
  __syncthreads();
  const Three found = tile[i];
  store(reinterpret_cast<Three*>(out) + i, found);
}
KERNEL(threes);

__global__ void large_array(float* out) {
  PAHM_SHARED(float, tile, 12 * 1024 + 4);
  tile[threadIdx.x] = 1.0f;
  store(out + threadIdx.x, 1.0f);
}
KERNEL(large_array);

// ---- global memory ----

__global__ void shift(const float* in, float* out, int by) {
  store(out + threadIdx.x, load(in + threadIdx.x + by));
}
KERNEL(shift);

__global__ void strided(const float* in, float* out, int by, int wrap) {
  store(out + threadIdx.x, load(in + threadIdx.x * by % wrap));
}
KERNEL(strided);

// A pack that begins `by` elements behind a multiple of its size.
__global__ void offset(const float* in, float* out, int by) {
  const auto pack = load(reinterpret_cast<const Pack<float, 2>*>(in + threadIdx.x / 2 * 2 + by));
  store(out + threadIdx.x, pack.values[threadIdx.x % 2]);
}
KERNEL(offset);

// Every thread adds to one number.
__global__ void count_up(float* out, bool atomic) {
  if (atomic) {
    pahm::atomic_add(out, 1.0f);
  } else {
    store(out, load(out) + 1.0f);
  }
}
KERNEL(count_up);

// Adds to one number, which another thread then reads.
__global__ void count_and_read(float* out, bool barrier) {
  const int i = threadIdx.x;
  pahm::atomic_add(out, 1.0f);
  if (barrier) __syncthreads();
  if (i == 7) store(out + 1, load(out));
}
KERNEL(count_and_read);

// Moves all elements down by one, in place.
__global__ void move_down(float* data, bool barrier) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float next = load(data + i + 1);
  if (barrier) __syncthreads();
  store(data + i, next);
}
KERNEL(move_down);

// All blocks read; one of them, or none, also writes.
__global__ void one_writes(float* data, int writer) {
  const float x = load(data + threadIdx.x);
  if (static_cast<int>(blockIdx.x) == writer) store(data + threadIdx.x, x + 1);
}
KERNEL(one_writes);

// Each thread reads what the thread `distance` away has just written.
__global__ void global_neighbour(float* out, int barrier, int distance) {
  const int i = threadIdx.x;
  store(out + i, static_cast<float>(i));
  meet(barrier);
  store(out + threads + i, load(out + (i ^ distance)));
}
KERNEL(global_neighbour);

// Blocks write `threads` halves each, `step` apart: neighbouring halves are two elements.
__global__ void halves(uint16_t* out, int step) {
  store(out + blockIdx.x * step + threadIdx.x, static_cast<uint16_t>(threadIdx.x));
}
KERNEL(halves);

// A thread reads two halves as one, another writes the second.
__global__ void halves_and_word(uint16_t* out, bool barrier) {
  if (threadIdx.x == 0) static_cast<void>(load(reinterpret_cast<const uint32_t*>(out)));
  if (barrier) __syncthreads();
  if (threadIdx.x == 1) store(out + 1, uint16_t{5});
}
KERNEL(halves_and_word);

// Reads 16 bytes that the thread itself wrote or added to, at once or one by one.
__global__ void read_only(float* out, bool pack, bool add) {
  float* const own = out + 4 * threadIdx.x;
  for (int k = 0; k < 4; ++k) {
    if (add) {
      pahm::atomic_add(own + k, 1.0f);
    } else {
      store(own + k, 1.0f);
    }
  }
  if (add) __syncthreads();
  float sum = 0;
  if (pack) {
    for (const float value : load(reinterpret_cast<const Pack<float, 4>*>(own)).values) sum += value;
  } else {
    for (int k = 0; k < 4; ++k) sum += load(own + k);
  }
  store(own, sum);
}
KERNEL(read_only);

// Every block reads the same `threads` numbers twice, and writes as many of its own.
__global__ void traffic(const float* in, float* out) {
  const float once = load(in + threadIdx.x), twice = load(in + threads - 1 - threadIdx.x);
  store(out + blockIdx.x * threads + threadIdx.x, once + twice);
}
KERNEL(traffic);

// ---- barriers and warps ----

// Half of the block does not come to the barrier; or comes to another.
__global__ void divergent(float* out, int kind) {
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
  store(out + threadIdx.x, 1.0f);
}
KERNEL(divergent);

// A sum over a warp, or its lower half; `mask` may leave lanes out, or name lanes that do not come.
__global__ void warp_sum(const float* in, float* out, int64_t mask, bool lower_half_only) {
  const int lane = threadIdx.x % 32;
  float value = load(in + threadIdx.x);
  if (lower_half_only && lane >= 16) return;
  const int first = lower_half_only ? 8 : 16;
  for (int lanes = first; lanes > 0; lanes /= 2)
    value += pahm::shuffle_xor(static_cast<uint32_t>(mask), value, lanes);
  if (lane == 0) store(out + threadIdx.x / 32, value);
}
KERNEL(warp_sum);

// Each lane takes the number of lane `source`.
__global__ void broadcast(float* out, int64_t mask, int source) {
  if (!(mask >> threadIdx.x % 32 & 1)) return;
  store(out + threadIdx.x,
        pahm::shuffle(static_cast<uint32_t>(mask), static_cast<float>(threadIdx.x % 32), source));
}
KERNEL(broadcast);

// Counts the lanes of a warp; `mask` may leave out those who ask.
__global__ void vote(float* out, int64_t mask) {
  const uint32_t found = pahm::ballot(static_cast<uint32_t>(mask), threadIdx.x % 2 == 0);
  store(out + threadIdx.x, static_cast<float>(__popc(found)));
}
KERNEL(vote);

// The halves of a warp vote at one place or at two.
__global__ void two_votes(float* out, bool together) {
  uint32_t found = 0;
  if (together || threadIdx.x % 32 < 16) {
    found = pahm::ballot(full, true);
  } else {
    found = pahm::ballot(full, true);
  }
  store(out + threadIdx.x, static_cast<float>(__popc(found)));
}
KERNEL(two_votes);

}  // namespace

// Launches that a device may refuse.
extern "C" const char* limits(int64_t blocks, int block_threads, int64_t shared_bytes, int64_t shared_limit,
                              float* out, uint64_t seed, simt::Counts* counts) {
  return run(counts, [&] {
    pahm::launch(unwritten, blocks, block_threads, shared_bytes, device(seed, 4, shared_limit), out, true);
  });
}
PAHM_CASE(limits);
