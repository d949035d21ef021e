// Products of bfloat16 matrices, summed in float32, with vectors (AVX512-BF16) or tiles (AMX). Compiled once,
// by spiral_conv_bf16.cpp, for a CPU with both; functions that use tiles run only on CPUs with tiles.
namespace pahm::PAHM_ISA {

using BFloat16 = c10::BFloat16;

// Products are cut into blocks of this many rows and columns, and of this many numbers along the sum.
inline constexpr int64_t block_rows = 32, block_columns = 32, depth_step = 32;

enum class Unit { vectors, tiles };

// Configures all eight tiles as 16 rows of 64 bytes. The CPU keeps the setting for each thread.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

struct NoTiles {};
template <Unit U>
using Setup = std::conditional_t<U == Unit::tiles, Tiles, NoTiles>;

// C (32, 32) = A (32, depth) times B, or C += that. `depth` is a multiple of 32. B is (depth / 2, 32, 2):
// pairs of numbers along the sum are adjacent, as the instructions require.
template <Unit U>
inline void block_product(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t depth, float* c,
                          bool add) {
  if constexpr (U == Unit::tiles) {
    constexpr int c_bytes = block_columns * sizeof(float), b_bytes = block_columns * 2 * sizeof(BFloat16);
    const int64_t a_bytes = a_stride * static_cast<int64_t>(sizeof(BFloat16));
    float* const lower = c + 16 * block_columns;
    if (add) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += depth_step) {
      const BFloat16* const columns = b + k * block_columns;
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, columns, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, columns + block_columns, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + 16, c_bytes);
  } else {
    constexpr int rows = 8;
    for (int64_t first = 0; first < block_rows; first += rows) {
      float* const out = c + first * block_columns;
      const BFloat16* const left = a + first * a_stride;
      __m512 sum[rows][2];
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        sum[i][0] = add ? _mm512_loadu_ps(out + i * block_columns) : _mm512_setzero_ps();
        sum[i][1] = add ? _mm512_loadu_ps(out + i * block_columns + 16) : _mm512_setzero_ps();
      }
      for (int64_t k = 0; k < depth; k += 2) {
        const auto right0 = (__m512bh)_mm512_loadu_si512(b + k * block_columns);
        const auto right1 = (__m512bh)_mm512_loadu_si512(b + (k + 1) * block_columns);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          int32_t pair;
          std::memcpy(&pair, left + i * a_stride + k, sizeof pair);
          const auto both = (__m512bh)_mm512_set1_epi32(pair);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, right0);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, right1);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        _mm512_storeu_ps(out + i * block_columns, sum[i][0]);
        _mm512_storeu_ps(out + i * block_columns + 16, sum[i][1]);
      }
    }
  }
}

// Interleaves two rows of `count` numbers (at most 32) into (32, 2), zero beyond `count`; a null row is zero.
inline void interleave(const BFloat16* upper, const BFloat16* lower, int64_t count, BFloat16* out) {
  const auto half = [count](const BFloat16* row, int64_t first) __attribute__((always_inline)) {
    const int64_t left = count - first;
    if (row == nullptr || left <= 0) return Vec<uint32_t>{};
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m256i numbers = _mm256_maskz_loadu_epi16(mask, row + first);
    return __builtin_convertvector((typename VectorOf<uint16_t, 32>::type)numbers, Vec<uint32_t>);
  };
  for (int64_t first = 0; first < block_columns; first += 16) {
    const Vec<uint32_t> pairs = half(upper, first) | half(lower, first) << 16;
    std::memcpy(static_cast<void*>(out + 2 * first), &pairs, sizeof pairs);
  }
}

}  // namespace pahm::PAHM_ISA
