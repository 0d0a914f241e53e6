// What a call of one of PyTorch's ops is, as numbers: all that a launch depends on, so that calls of one kind are known again.

#pragma once

#include "shared.h"

#include <ATen/Context.h>
#include <ATen/core/stack.h>

#include <array>
#include <cstring>
#include <optional>
#include <vector>

namespace served {

using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const { return hashed(key.data(), key.size()); }
};

// Writes a call into a key, argument by argument: sizes, strides, dtypes, alignment, numbers. Each says false for a call
// that is not to be served.
class Description {
 public:
  Description(Key& key, const void* op) : key_(key), kind_(served_kind()) {
    key_.clear();
    key_.push_back(reinterpret_cast<int64_t>(op));
    const auto& context = at::globalContext();
    key_.push_back(2 * context.deterministicAlgorithmsWarnOnly() + context.deterministicAlgorithms());
  }

  bool any() const { return any_; }  // tensor at all?

  bool add(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      key_.push_back(-1);
      return true;
    }
    if (tensor.device().type() != kind_ || !ordinary(tensor, kind_)) return false;
    if (!any_) {
      any_ = true;
      device_ = tensor.device().index();
      key_.push_back(device_);
    } else if (device_ != tensor.device().index()) {
      return false;
    }
    key_.push_back(static_cast<int64_t>(tensor.scalar_type()) << 8 | tensor.dim());
    key_.insert(key_.end(), tensor.sizes().begin(), tensor.sizes().end());
    key_.insert(key_.end(), tensor.strides().begin(), tensor.strides().end());
    key_.push_back(reinterpret_cast<int64_t>(tensor.const_data_ptr()) & 15);
    return true;
  }

  bool add(double number) {
    int64_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    key_.push_back(bits);
    return true;
  }

  bool add(int64_t number) {
    key_.push_back(number);
    return true;
  }

  bool add(bool flag) {
    key_.push_back(flag);
    return true;
  }

  bool add(const c10::SymInt& number) {
    const auto known = number.maybe_as_int();
    return known && add(*known);
  }

  template <class Each>
  bool add(c10::ArrayRef<Each> list) {
    key_.push_back(static_cast<int64_t>(list.size()));
    for (const auto& each : list) {
      if (!add(each)) return false;
    }
    return true;
  }

  template <size_t count>
  bool add(const std::array<bool, count>& list) {
    return add(c10::ArrayRef<bool>(list));
  }

  template <class Given>
  bool add(const std::optional<Given>& given) {
    if (given) return add(*given);
    key_.push_back(-2);
    return true;
  }

  template <class Each>
  bool add(const c10::OptionalArrayRef<Each>& given) {
    if (given) return add(*given);
    key_.push_back(-2);
    return true;
  }

  bool add(const c10::IValue& arg) {
    if (arg.isTensor()) return add(arg.toTensor());
    if (arg.isNone()) {
      key_.push_back(-2);
      return true;
    }
    if (arg.isDouble()) return add(arg.toDouble());
    if (arg.isInt()) return add(arg.toInt());
    if (arg.isBool()) return add(arg.toBool());
    if (!arg.isList()) return false;
    const auto list = arg.toListRef();
    key_.push_back(static_cast<int64_t>(list.size()));
    for (const auto& each : list) {
      if (!each.isInt() && !each.isBool()) return false;
      key_.push_back(each.isInt() ? each.toInt() : each.toBool());
    }
    return true;
  }

 private:
  Key& key_;
  const c10::DeviceType kind_;
  bool any_ = false;
  int device_ = 0;
};

}  // namespace served
