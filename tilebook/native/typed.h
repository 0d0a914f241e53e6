// PyTorch's ops by their types. A call that is left to PyTorch goes on to its kernel as it came: to have its arguments put
// on a stack, and its results, as `serve` has them, takes the host as long as some kernels do.

#pragma once

#include <ATen/core/stack.h>
#include <ATen/ops/_flash_attention_backward_ops.h>
#include <ATen/ops/_flash_attention_forward_ops.h>
#include <ATen/ops/_fused_rms_norm_backward_ops.h>
#include <ATen/ops/_fused_rms_norm_ops.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward_ops.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_ops.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward_ops.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_ops.h>
#include <ATen/ops/convolution_backward_ops.h>
#include <ATen/ops/max_pool2d_with_indices_backward_ops.h>
#include <ATen/ops/native_layer_norm_backward_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>

#include <string>
#include <tuple>
#include <utility>

namespace served {
namespace {

template <class Result>
struct Popped {
  static Result from(Stack& stack) { return torch::jit::pop(stack).to<Result>(); }
};

template <class... Results>
struct Popped<std::tuple<Results...>> {
  static std::tuple<Results...> from(Stack& stack) { return each(stack, std::index_sequence_for<Results...>()); }

 private:
  template <size_t... at>
  static std::tuple<Results...> each(Stack& stack, std::index_sequence<at...>) {
    return {std::move(torch::jit::peek(stack, at, sizeof...(at))).template to<Results>()...};
  }
};

template <class Op, bool of_rows, class Signature = typename Op::schema>
struct Typed;

template <class Op, bool of_rows, class Result, class... Args>
struct Typed<Op, of_rows, Result(Args...)> {
  static Result call(DispatchKeySet ks, Args... args) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    const bool all = always_ask.load(std::memory_order_relaxed);
    if (!on.load(std::memory_order_relaxed) || asking) return Op::redispatch(ks & below(), args...);
    if constexpr (of_rows) {
      if (!all && has_one_row(std::get<0>(std::tie(args...)))) return Op::redispatch(ks & below(), args...);
    }
    Description call(key, &op.schema());
    if (!(call.add(args) && ...) || !call.any()) return Op::redispatch(ks & below(), args...);
    met.store(true, std::memory_order_relaxed);
    const auto kind = all ? nullptr : found();
    if (kind && kind->decision == Decision::left) {
      kind->calls.fetch_add(1, std::memory_order_relaxed);
      return Op::redispatch(ks & below(), args...);
    }
    Stack stack;
    torch::jit::push(stack, args...);
    if (!answered(op, ks, &stack, kind, all)) op.redispatchBoxed(ks & below(), &stack);
    return Popped<Result>::from(stack);
  }
};

using Maker = torch::CppFunction (*)();

template <class Op, bool of_rows>
torch::CppFunction made() {
  return torch::CppFunction::makeFromUnboxedFunction(&Typed<Op, of_rows>::call);
}

// The kernel of an op whose types are known here, or null.
Maker typed(const std::string& name, bool of_rows) {
  using namespace at::_ops;
#define TILEBOOK_TYPED(op) \
  if (name == "aten::" #op) return of_rows ? &made<op, true> : &made<op, false>;
  TILEBOOK_TYPED(_scaled_dot_product_cudnn_attention)
  TILEBOOK_TYPED(_scaled_dot_product_cudnn_attention_backward)
  TILEBOOK_TYPED(_scaled_dot_product_flash_attention)
  TILEBOOK_TYPED(_scaled_dot_product_flash_attention_backward)
  TILEBOOK_TYPED(_flash_attention_forward)
  TILEBOOK_TYPED(_flash_attention_backward)
  TILEBOOK_TYPED(native_layer_norm)
  TILEBOOK_TYPED(native_layer_norm_backward)
  TILEBOOK_TYPED(_fused_rms_norm)
  TILEBOOK_TYPED(_fused_rms_norm_backward)
  TILEBOOK_TYPED(convolution_backward)
  TILEBOOK_TYPED(max_pool2d_with_indices_backward)
#undef TILEBOOK_TYPED
  return nullptr;
}

}  // namespace
}  // namespace served
