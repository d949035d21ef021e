// Runs a frozen network: the steps of a program, on values in one workspace. pahm_ops/frozen writes programs.
//
// A program is an int64 tensor: the number of float32 lanes that its weights were laid out for, then the
// steps, each a Kind and its fields in the order in which the functions below read them. A place in memory is
// two fields, the number of a tensor in `memory` and an offset in its elements; rows have a third, the
// stride. What a step may touch is checked when it is read, so that no program reads or writes out of bounds.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common/ceil_div.h"
#include "cpu/frozen_shared.h"
#include "cpu/isa.h"
#include "cpu/operands.h"
#include "cpu/team.h"
#include "cpu/vertex_sample_shared.h"

#define PAHM_KERNEL_FILE "cpu/frozen.h"
#include "cpu/foreach_isa.h"

namespace pahm {
namespace {

using Step = std::variant<Product, Winograd, Depthwise, MaxPool, Pad, Upsample, Norm, Elementwise,
                          SparseProduct, Attention, Sample, SoftArgmax>;

int64_t lanes_of(Isa isa) { return isa >= Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4; }

class Reader {
 public:
  Reader(const std::vector<Tensor>& memory, const Tensor& program) {
    check(program.is_cpu() && program.dim() == 1 && program.scalar_type() == ScalarType::Long &&
              program.is_contiguous(),
          "program must be a contiguous int64 vector on the CPU");
    next_ = program.const_data_ptr<int64_t>();
    end_ = next_ + program.numel();
    for (const Tensor& t : memory) {
      check_cpu(t, "memory");
      check(t.is_contiguous(), "memory must be contiguous");
      const bool floats = t.scalar_type() == ScalarType::Float;
      check(floats || t.scalar_type() == ScalarType::Int, "memory must be float32 or int32");
      memory_.push_back({t.mutable_data_ptr(), t.numel(), floats});
    }
    // Tables are checked before the first step runs, so no step may overwrite them.
    for (const Memory& a : memory_) {
      for (const Memory& b : memory_) {
        const auto begin = reinterpret_cast<uintptr_t>(a.data), other = reinterpret_cast<uintptr_t>(b.data);
        const bool apart = begin >= other + static_cast<uintptr_t>(b.count) * 4 ||
                           other >= begin + static_cast<uintptr_t>(a.count) * 4;
        check(a.floats == b.floats || apart, "memory must not hold floats and integers in one place");
      }
    }
  }

  bool more() const { return next_ != end_; }
  int64_t number() {
    check(more(), "program ends within a step");
    return *next_++;
  }
  // A size, at least `least` and so small that products of a few of them are checked by `product` alone.
  int64_t size(int64_t least = 1) {
    const int64_t value = number();
    check(value >= least && value <= largest,
          [&] { return "program has a size of " + std::to_string(value); });
    return value;
  }
  double real() { return std::bit_cast<double>(number()); }
  template <typename E>
  E choice(E last) {
    const int64_t value = number();
    check(value >= 0 && value <= static_cast<int64_t>(last), "program has an unknown choice");
    return static_cast<E>(value);
  }

  float* floats(int64_t count) { return static_cast<float*>(place(true, count)); }
  const int32_t* integers(int64_t count) { return static_cast<const int32_t*>(place(false, count)); }
  // Null if the tensor's number is -1.
  const int32_t* integers_or_none(int64_t count) { return none(2) ? nullptr : integers(count); }
  RowsOut rows(int64_t count, int64_t width) {
    const int64_t stride = end_ - next_ > 2 ? next_[2] : -1;
    check(stride >= 0, "program has rows of an unknown stride");
    int64_t extent = 0;
    check(!__builtin_add_overflow(product(count - 1, stride), width, &extent), "program has rows too long");
    float* data = floats(extent);
    ++next_;
    return {data, count == 1 ? width : stride};
  }
  RowsOut rows_apart(int64_t count, int64_t width) {
    const RowsOut out = rows(count, width);
    check(out.stride >= width, "program has rows that overlap");
    return out;
  }
  RowsIn rows_in(int64_t count, int64_t width) {
    const RowsOut out = rows(count, width);
    return {out.data, out.stride};
  }
  RowsIn rows_in_apart(int64_t count, int64_t width) {
    const RowsOut out = rows_apart(count, width);
    return {out.data, out.stride};
  }
  RowsIn rows_or_none(int64_t count, int64_t width) {
    return none(3) ? RowsIn{nullptr, 0} : rows_in(count, width);
  }

 private:
  // Sums and small multiples of sizes do not overflow.
  static constexpr int64_t largest = int64_t{1} << 40;

  struct Memory {
    void* data;
    int64_t count;
    bool floats;
  };

  bool none(int64_t fields) {
    if (end_ - next_ < fields || *next_ != -1) return false;
    next_ += fields;
    return true;
  }

  void* place(bool floats, int64_t count) {
    const int64_t index = number(), offset = number();
    check(index >= 0 && index < static_cast<int64_t>(memory_.size()), "program names an unknown tensor");
    const Memory& m = memory_[static_cast<size_t>(index)];
    check(m.floats == floats, "program names a tensor of another type");
    check(offset >= 0 && offset <= m.count && count <= m.count - offset, "program leaves its memory");
    return static_cast<char*>(m.data) + offset * 4;
  }

  const int64_t *next_ = nullptr, *end_ = nullptr;
  std::vector<Memory> memory_;
};

void check_entries(const int32_t* table, int64_t count, int64_t least, int64_t limit) {
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, table[i]);
    high = std::max(high, table[i]);
  }
  check(count == 0 || (low >= least && high < limit), "program has a table that leaves its input");
}

// What steps point at besides memory.
struct Storage {
  std::deque<std::vector<ProductSource>> sources;
  std::deque<std::vector<SampledMap>> maps;
};

Product read_product(Reader& in, int64_t lanes, Storage& storage) {
  Product a{};
  a.batch = in.size();
  a.rows = in.size();
  a.columns = in.size();
  a.activation = in.choice(Activation::silu);
  const int64_t all_rows = product(a.batch, a.rows);
  a.out = in.rows_apart(all_rows, a.columns);
  a.residual = in.choice(Residual::after_activation);
  a.added = in.rows_or_none(all_rows, a.columns);
  check((a.added.data == nullptr) == (a.residual == Residual::none), "program has half a residual");
  std::vector<ProductSource>& sources = storage.sources.emplace_back();
  int64_t widest = 0;
  for (int64_t left = in.size(); left > 0; --left) {
    ProductSource source{};
    source.rows = in.size();
    source.channels = in.size();
    source.in = in.rows_in(product(a.batch, source.rows), source.channels);
    source.table = in.integers_or_none(a.rows);
    if (source.table == nullptr) {
      check(source.rows == a.rows, "program has a source of other rows than its product");
    } else {
      check_entries(source.table, a.rows, -1, source.rows);
      widest = std::max(widest, source.channels);
    }
    a.inputs += source.channels;
    sources.push_back(source);
  }
  a.sources = sources.data();
  a.source_count = static_cast<int64_t>(sources.size());
  // The last panel is one vector wide if that is enough (product.h).
  const int64_t padded = ceil_div(a.columns, lanes) * lanes;
  a.weight = in.floats(product(padded, a.inputs));
  a.bias = in.floats(padded);
  a.zeros = in.floats(widest);
  return a;
}

Winograd read_winograd(Reader& in, int64_t lanes) {
  Winograd a{};
  a.batch = in.size();
  a.height = in.size();
  a.width = in.size();
  a.channels = in.size();
  a.columns = in.size();
  check(a.channels % lanes == 0, "program has a Winograd convolution of channels that fill no vectors");
  a.activation = in.choice(Activation::silu);
  const int64_t pixels = product(a.batch, product(a.height, a.width));
  a.in = in.rows_in(pixels, a.channels);
  a.out = in.rows_apart(pixels, a.columns);
  a.residual = in.choice(Residual::after_activation);
  a.added = in.rows_or_none(pixels, a.columns);
  check((a.added.data == nullptr) == (a.residual == Residual::none), "program has half a residual");
  const int64_t padded = ceil_div(a.columns, lanes) * lanes;
  a.weight = in.floats(product(padded, product(16, a.channels)));
  a.bias = in.floats(padded);
  a.zeros = in.floats(a.channels);
  a.slots = in.size();
  product(16 * 24, a.channels + 32);
  a.scratch = in.floats(product(a.slots, winograd_scratch(a.channels)));
  return a;
}

template <typename Step>
void read_map(Reader& in, Step& a) {
  a.batch = in.size();
  a.height = in.size();
  a.width = in.size();
  a.channels = in.size();
  a.out_height = in.size();
  a.out_width = in.size();
  a.in = in.rows_in_apart(product(a.batch, product(a.height, a.width)), a.channels);
  a.out = in.rows_apart(product(a.batch, product(a.out_height, a.out_width)), a.channels);
}

// The window of a kernel; each output pixel must see at least one pixel.
template <typename Step>
void read_window(Reader& in, Step& a) {
  a.kernel_height = in.size();
  a.kernel_width = in.size();
  a.stride_y = in.size();
  a.stride_x = in.size();
  a.top = in.size(0);
  a.left = in.size(0);
  check(a.top < a.kernel_height && product(a.out_height - 1, a.stride_y) - a.top < a.height &&
            a.left < a.kernel_width && product(a.out_width - 1, a.stride_x) - a.left < a.width,
        "program has a window that leaves its map");
}

Depthwise read_depthwise(Reader& in) {
  Depthwise a{};
  read_map(in, a);
  read_window(in, a);
  a.weight = in.floats(product(product(a.kernel_height, a.kernel_width), a.channels));
  a.bias = in.floats(a.channels);
  a.activation = in.choice(Activation::silu);
  return a;
}

MaxPool read_max_pool(Reader& in) {
  MaxPool a{};
  read_map(in, a);
  read_window(in, a);
  return a;
}

Pad read_pad(Reader& in) {
  Pad a{};
  read_map(in, a);
  a.top = in.size(0);
  a.left = in.size(0);
  return a;
}

Upsample read_upsample(Reader& in) {
  Upsample a{};
  read_map(in, a);
  return a;
}

Norm read_norm(Reader& in) {
  Norm a{};
  a.rows = in.size();
  a.channels = in.size();
  a.epsilon = in.real();
  a.in = in.rows_in(a.rows, a.channels);
  a.gamma = in.floats(a.channels);
  a.beta = in.floats(a.channels);
  a.out = in.rows_apart(a.rows, a.channels);
  return a;
}

Elementwise read_elementwise(Reader& in) {
  Elementwise a{};
  a.rows = in.size();
  a.channels = in.size();
  a.scale = in.real();
  a.in = in.rows_in(a.rows, a.channels);
  a.added = in.rows_or_none(a.rows, a.channels);
  a.activation = in.choice(Activation::silu);
  a.out = in.rows_apart(a.rows, a.channels);
  return a;
}

SparseProduct read_sparse_product(Reader& in) {
  SparseProduct a{};
  a.batch = in.size();
  a.vertices = in.size();
  a.rows = in.size();
  a.channels = in.size();
  const int64_t entries = in.size(0);
  a.pointers = in.integers(a.rows + 1);
  a.columns = in.integers(entries);
  a.values = in.floats(entries);
  for (int64_t r = 0; r < a.rows; ++r) {
    check(a.pointers[r] >= 0 && a.pointers[r] <= a.pointers[r + 1], "program has row pointers that fall");
  }
  check(a.pointers[a.rows] <= entries, "program has row pointers that leave their matrix");
  check_entries(a.columns, entries, 0, a.vertices);
  a.in = in.rows_in(product(a.batch, a.vertices), a.channels);
  a.out = in.rows_apart(product(a.batch, a.rows), a.channels);
  return a;
}

SoftArgmax read_soft_argmax(Reader& in) {
  SoftArgmax a{};
  a.batch = in.size();
  a.pixels = in.size();
  a.channels = in.size();
  a.in = in.rows_in(product(a.batch, a.pixels), a.channels);
  a.places = in.floats(product(2, a.pixels));
  a.out = in.rows_apart(product(a.batch, a.channels), 2);
  return a;
}

Attention read_attention(Reader& in) {
  Attention a{};
  a.batch = in.size();
  a.vertices = in.size();
  a.heads = in.size();
  a.channels = in.size();
  a.scale = in.real();
  const int64_t rows = product(a.batch, a.vertices), width = product(a.heads, a.channels);
  a.q = in.rows_in(rows, width);
  a.k = in.rows_in(rows, width);
  a.v = in.rows_in(rows, width);
  product(product(rows + 32, width + 32), 4);
  a.scratch = in.floats(product(product(a.batch, a.heads), attention_scratch(a.vertices, a.channels)));
  a.out = in.rows_apart(rows, width);
  return a;
}

Sample read_sample(Reader& in, Storage& storage) {
  Sample a{};
  a.batch = in.size();
  a.vertices = in.size();
  std::vector<SampledMap>& maps = storage.maps.emplace_back();
  int64_t channels = 0, widest = 0;
  for (int64_t left = in.size(); left > 0; --left) {
    SampledMap map{};
    map.height = in.size();
    map.width = in.size();
    map.channels = in.size();
    map.in = in.rows_in(product(a.batch, product(map.height, map.width)), map.channels);
    channels += map.channels;
    widest = std::max(widest, map.channels);
    maps.push_back(map);
  }
  a.maps = maps.data();
  a.map_count = static_cast<int64_t>(maps.size());
  const bool camera = in.number() != 0;
  a.points = in.rows_in(product(a.batch, a.vertices), camera ? 3 : 2);
  a.camera = in.rows_or_none(a.batch, 3);
  check(camera == (a.camera.data != nullptr), "program has a camera in one place only");
  a.align_corners = in.number() != 0;
  a.border = in.number() != 0;
  a.zeros = in.floats(widest);
  a.out = in.rows_apart(product(a.batch, a.vertices), channels);
  return a;
}

Step read_step(Reader& in, int64_t lanes, Storage& storage) {
  switch (const int64_t kind = in.number()) {
    case 0:
      return read_product(in, lanes, storage);
    case 1:
      return read_depthwise(in);
    case 2:
      return read_max_pool(in);
    case 3:
      return read_pad(in);
    case 4:
      return read_upsample(in);
    case 5:
      return read_norm(in);
    case 6:
      return read_elementwise(in);
    case 7:
      return read_sparse_product(in);
    case 8:
      return read_attention(in);
    case 9:
      return read_sample(in, storage);
    case 10:
      return read_winograd(in, lanes);
    case 11:
      return read_soft_argmax(in);
    default:
      throw std::invalid_argument("program has an unknown kind of step: " + std::to_string(kind));
  }
}

// About how many multiplications, or numbers moved, a step takes in all.
double work(const Product& a) { return 1.0 * a.batch * a.rows * a.columns * a.inputs; }
double work(const Winograd& a) { return 4.5 * a.batch * a.height * a.width * a.columns * a.channels; }
double work(const Depthwise& a) {
  return 2.0 * a.batch * a.out_height * a.out_width * a.channels * a.kernel_height * a.kernel_width;
}
double work(const MaxPool& a) {
  return 4.0 * a.batch * a.out_height * a.out_width * a.channels * a.kernel_height * a.kernel_width;
}
double work(const Pad& a) { return 4.0 * a.batch * a.out_height * a.out_width * a.channels; }
double work(const Upsample& a) { return 8.0 * a.batch * a.out_height * a.out_width * a.channels; }
double work(const Norm& a) { return 12.0 * a.rows * a.channels; }
double work(const Elementwise& a) { return 8.0 * a.rows * a.channels; }
double work(const SparseProduct& a) { return 12.0 * a.batch * a.rows * a.channels; }
double work(const Attention& a) {
  return 1.0 * a.batch * a.heads * a.vertices * (2.0 * a.channels * a.vertices + 16.0 * a.vertices);
}
double work(const SoftArgmax& a) { return 32.0 * a.batch * a.pixels * a.channels; }
double work(const Sample& a) {
  double channels = 0;
  for (int64_t i = 0; i < a.map_count; ++i) channels += static_cast<double>(a.maps[i].channels);
  return 16.0 * a.batch * a.vertices * channels;
}

class Runner final : public Chunks {
 public:
  Runner(Isa isa, std::vector<Step>& steps, int threads) : isa_(isa), steps_(steps) {
    for (Step& step : steps) {
      if (auto* a = std::get_if<Product>(&step)) PAHM_ISA_CALL_AS(isa, cut, *a);
      if (auto* a = std::get_if<Winograd>(&step)) {
        PAHM_ISA_CALL_AS(isa, cut, *a);
        threads = std::min(threads, static_cast<int>(std::min<int64_t>(a->slots, threads)));
      }
      int64_t items = 0;
      const double total = std::visit(
          [&](const auto& a) {
            PAHM_ISA_CALL_AS(isa, count_items, a, items);
            return work(a);
          },
          step);
      // Enough chunks that no thread waits long for the last one, none so small that taking it costs more.
      constexpr double least_work = 200e3;
      const auto most = static_cast<int64_t>(std::min(8.0 * threads, std::max(1.0, total / least_work)));
      const int64_t size = ceil_div(items, threads == 1 ? 1 : std::min(most, items));
      cuts_.push_back({items, size, ceil_div(items, size)});
    }
    threads_ = threads;
  }

  void run_all() {
    TeamHold team(threads_);
    for (size_t i = 0; i < steps_.size(); ++i) team.share(*this, static_cast<int64_t>(i), cuts_[i].chunks);
  }

  void run(int64_t step, int64_t chunk, int slot) noexcept override {
    const Cut& cut = cuts_[static_cast<size_t>(step)];
    const int64_t begin = chunk * cut.size, end = std::min(cut.items, begin + cut.size);
    std::visit([&](const auto& a) { PAHM_ISA_CALL_AS(isa_, run_items, a, begin, end, slot); },
               steps_[static_cast<size_t>(step)]);
  }

 private:
  struct Cut {
    int64_t items, size, chunks;
  };
  Isa isa_;
  std::vector<Step>& steps_;
  std::vector<Cut> cuts_;
  int threads_;
};

void frozen_run(const std::vector<Tensor>& memory, const Tensor& program, int64_t threads) {
  check(threads >= 1, "threads must be at least 1");
  const Isa isa = active_isa();
  Reader in(memory, program);
  const int64_t lanes = in.number();
  check(lanes == lanes_of(isa), "program is laid out for another instruction set");
  Storage storage;
  std::vector<Step> steps;
  while (in.more()) steps.push_back(read_step(in, lanes, storage));
  const int count = static_cast<int>(std::min<int64_t>(threads, 256));
  Runner(isa, steps, count).run_all();
}

}  // namespace
}  // namespace pahm

STABLE_TORCH_LIBRARY_IMPL(pahm_ops, CPU, m) { m.impl("_frozen_run", TORCH_BOX(&pahm::frozen_run)); }
