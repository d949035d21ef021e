// Runs one case in a process of its own, for sanitizers: main CASE RESULT, both files as
// tests/helpers/simt_kernels.py has them. Each tensor lies in a heap block of its exact size.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>

#include "cases.h"

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit);
  }

  template <typename T>
  T number() {
    T value;
    file_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  std::string text() {
    std::string value(static_cast<size_t>(number<int64_t>()), '\0');
    file_.read(value.data(), static_cast<std::streamsize>(value.size()));
    return value;
  }

  // The tensors and lists that it points at live as long as the reader.
  simt::Argument argument() {
    simt::Argument a{};
    a.kind = static_cast<simt::Kind>(number<int64_t>());
    if (a.kind == simt::Kind::integer) a.integer = number<int64_t>();
    if (a.kind == simt::Kind::real) a.real = number<double>();
    if (a.kind == simt::Kind::tensors) {
      lists_.push_back(arguments());
      a.data = lists_.back().data();
      a.length = static_cast<int64_t>(lists_.back().size());
    }
    if (a.kind == simt::Kind::integers || a.kind == simt::Kind::reals) {
      a.length = number<int64_t>();
      a.data = block(static_cast<size_t>(a.length) * 8, 0);
    }
    if (a.kind == simt::Kind::tensor) {
      a.item_bytes = static_cast<int32_t>(number<int64_t>());
      const auto skew = static_cast<size_t>(number<int64_t>());
      a.length = number<int64_t>();
      a.data = a.length ? block(static_cast<size_t>(a.length), skew) : nullptr;
    }
    return a;
  }
  std::vector<simt::Argument> arguments() {
    std::vector<simt::Argument> all(static_cast<size_t>(number<int64_t>()));
    for (simt::Argument& a : all) a = argument();
    return all;
  }

 private:
  // `skew` bytes behind where a GPU's allocations begin.
  void* block(size_t bytes, size_t skew) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, skew + bytes) != 0) throw std::bad_alloc();
    blocks_.emplace_back(memory);
    char* const data = static_cast<char*>(memory) + skew;
    file_.read(data, static_cast<std::streamsize>(bytes));
    return data;
  }

  std::ifstream file_;
  std::vector<std::unique_ptr<void, Free>> blocks_;
  std::vector<std::vector<simt::Argument>> lists_;
};

void write_tensors(std::ofstream& file, const std::vector<simt::Argument>& arguments) {
  for (const simt::Argument& a : arguments) {
    if (a.kind == simt::Kind::tensor) file.write(static_cast<const char*>(a.data), a.length);
    if (a.kind == simt::Kind::tensors) {
      const auto* const items = static_cast<const simt::Argument*>(a.data);
      write_tensors(file, {items, items + a.length});
    }
  }
}

}  // namespace

int main(int, char** argv) {
  Reader in(argv[1]);
  const std::string name = in.text();
  const auto seed = in.number<uint64_t>();
  const auto races = in.number<int64_t>();
  const std::vector<simt::Argument> arguments = in.arguments();
  simt::Counts counts;
  const char* const complaint = simt_call(name.c_str(), arguments.data(),
                                          static_cast<int64_t>(arguments.size()), seed, races != 0, &counts);
  std::ofstream out(argv[2], std::ios::binary);
  const int64_t length = complaint ? static_cast<int64_t>(std::strlen(complaint)) : 0;
  out.write(reinterpret_cast<const char*>(&length), sizeof length);
  out.write(complaint, length);
  out.write(reinterpret_cast<const char*>(&counts), sizeof counts);
  write_tensors(out, arguments);
  return 0;
}
