// Calls of C++ functions whose names and arguments come from Python, by ctypes or in a file.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "requests.h"

namespace simt {

enum class Kind : int32_t { integer, real, tensor, tensors, integers, reals };

// As tests/helpers/simt_kernels.py lays it out.
struct Argument {
  Kind kind;
  int32_t item_bytes;  // of a tensor's element
  int64_t integer;
  double real;
  void* data;      // of a tensor, or a list: of Arguments, int64_t or double
  int64_t length;  // bytes of a tensor, elements of a list
};

class Call {
 public:
  Call(const std::string& name, const Argument* arguments, int64_t count)
      : name_(name), arguments_(arguments), count_(static_cast<size_t>(count)) {}

  template <typename... A>
  const char* operator()(const char* (*function)(A...), uint64_t seed, Counts* counts) {
    constexpr size_t own = sizeof...(A) - 2;
    if (count_ != own) {
      throw std::invalid_argument(name_ + " takes " + std::to_string(own) + " arguments, got " +
                                  std::to_string(count_));
    }
    return call(function, seed, counts, std::make_index_sequence<own>{});
  }

 private:
  template <typename... A, size_t... I>
  const char* call(const char* (*function)(A...), uint64_t seed, Counts* counts, std::index_sequence<I...>) {
    using Types = std::tuple<A...>;
    const std::tuple<std::tuple_element_t<I, Types>...> values{get<std::tuple_element_t<I, Types>>(I)...};
    return function(std::get<I>(values)..., seed, counts);
  }

  template <typename T>
  T get(size_t i) {
    const Argument& a = arguments_[i];
    if constexpr (std::is_integral_v<T>) {
      expect(i, a.kind == Kind::integer && std::in_range<int64_t>(a.integer) && fits<T>(a.integer),
             "an integer");
      return static_cast<T>(a.integer);
    } else if constexpr (std::is_floating_point_v<T>) {
      expect(i, a.kind == Kind::real, "a float");
      return static_cast<T>(a.real);
    } else {
      using E = std::remove_const_t<std::remove_pointer_t<T>>;
      if constexpr (std::is_pointer_v<E>) {
        expect(i, a.kind == Kind::tensors || (a.kind == Kind::integers && a.length == 0),
               "a list of tensors");
        return static_cast<T>(static_cast<void*>(pointers_of(a)));
      } else {
        const bool list = (std::is_same_v<E, int64_t> && a.kind == Kind::integers) ||
                          (std::is_same_v<E, double> && a.kind == Kind::reals);
        expect(i, list || a.kind == Kind::tensor, "a tensor");
        if constexpr (!std::is_void_v<E>) {
          expect(i, list || !a.data || a.item_bytes == sizeof(E),
                 "elements of " + std::to_string(sizeof(E)) + " bytes");
        }
        return static_cast<T>(a.data);
      }
    }
  }

  template <typename T>
  static bool fits(int64_t value) {
    if constexpr (std::is_same_v<T, bool>)
      return value == 0 || value == 1;
    else
      return std::in_range<T>(value);
  }

  void** pointers_of(const Argument& list) {
    pointers_.emplace_back();
    const auto* const items = static_cast<const Argument*>(list.data);
    for (int64_t i = 0; i < list.length; ++i) pointers_.back().push_back(items[i].data);
    return pointers_.back().data();
  }

  void expect(size_t i, bool right, const std::string& what) const {
    if (!right) throw std::invalid_argument(name_ + " expects " + what + " as argument " + std::to_string(i));
  }

  std::string name_;
  const Argument* arguments_;
  size_t count_;
  std::vector<std::vector<void*>> pointers_;
};

using Case = std::function<const char*(Call&, uint64_t, Counts*)>;

inline std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

template <typename... A>
bool add_case(const std::string& name, const char* (*function)(A...)) {
  cases()[name] = [function](Call& call, uint64_t seed, Counts* counts) {
    return call(function, seed, counts);
  };
  return true;
}

}  // namespace simt

// Lets Python call a function `const char* name(arguments..., uint64_t seed, simt::Counts* counts)`, which
// gives null or a complaint. Arguments: integers, floats, pointers to tensors (void, or of the element's
// size), and lists: `void* const*` of tensors, `const int64_t*`, `const double*`.
#define PAHM_CASE(name) [[maybe_unused]] static const bool name##_is_a_case = simt::add_case(#name, name)

// Calls a case. Null, or a complaint that lives until the next call.
extern "C" const char* simt_call(const char* name, const simt::Argument* arguments, int64_t count,
                                 uint64_t seed, int races, simt::Counts* counts);
