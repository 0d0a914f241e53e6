// Attention under a bias that learns, by PyTorch's memory-efficient kernels: `kernels/attention/learned.py`, as one node
// of autograd for its two.
//
// Rows that see nothing have log-sum-exps of -inf, of which the kernels of the gradients make NaN in all columns. With
// +inf in their place all that such a row has to do with anything is 0. A gradient that is to be differentiated again is
// PyTorch's op under autograd, which refuses that.

#include "shared.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nan_to_num.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <exception>
#include <limits>
#include <optional>
#include <vector>

namespace learning {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using Tensors = std::vector<Tensor>;

constexpr int64_t kEfficient = 2;  // of torch.nn.attention.SDPBackend
constexpr int64_t kColumns = 16;  // what a row of a bias is a multiple of
constexpr int64_t kVector = 16;  // bytes

// (B, H, Sq, Sk) of q's dtype, perhaps expanded, as the kernels load it: the bias where it lies, if it can be, else a
// copy of as much of it as differs. numbers: has such a copy any?
Tensor loaded(const Tensor& bias, const Tensor& q, bool numbers) {
  Tensor seen = differing(bias);
  if (seen.scalar_type() != q.scalar_type() || !seen.is_contiguous()) {
    seen = numbers ? seen.to(q.scalar_type()).contiguous() : at::empty(seen.sizes(), q.options());
  }
  return seen.expand({q.size(0), q.size(1), q.size(2), bias.size(3)});
}

// `layout.aligned`: a copy where it does not lie as the kernels load it, by whole vectors without looking.
Tensor aligned(const Tensor& x) {
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kVector == 0;
  if (fits && !x.is_contiguous()) {
    const int64_t last = x.dim() - 1, unit = static_cast<int64_t>(x.element_size());
    for (int64_t axis = 0; axis <= last; ++axis) {
      const int64_t step = x.stride(axis);
      if (x.size(axis) > 1) fits &= axis == last ? step == 1 : step > 0 && step * unit % kVector == 0;
    }
  }
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

struct Learned : torch::autograd::Function<Learned> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                        std::optional<double> scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor whole = loaded(bias, q, true);
    const auto [o, lse, seed, offset] =
        at::_scaled_dot_product_efficient_attention(q, k, v, whole, true, 0.0, false, scale);
    ctx->saved_data["scale"] = scale;
    // What is loaded where it lies is kept as it is given, so that a change of it before the gradient is noticed.
    ctx->save_for_backward({q, k, v, whole.is_alias_of(bias) ? bias : whole, o, lse, seed, offset});
    return o;
  }

  static Tensors backward(AutogradContext* ctx, Tensors gradients) {
    const auto saved = ctx->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &bias = saved[3], &o = saved[4], &lse = saved[5];
    const bool plain = ordinary(gradients[0], gradients[0].device().type());
    const Tensor dy = plain ? aligned(gradients[0]) : gradients[0].contiguous();
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (plain && !at::GradMode::is_enabled()) below.emplace();
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const Tensor known = at::nan_to_num(lse, std::numeric_limits<double>::quiet_NaN(), infinity, infinity);
    const std::array<bool, 4> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                     ctx->needs_input_grad(3)};
    const auto [dq, dk, dv, dbias] = at::_scaled_dot_product_efficient_attention_backward(
        dy, q, k, v, loaded(bias, q, true), o, known, saved[6], saved[7], 0.0, wanted, false,
        ctx->saved_data["scale"].toOptional<double>());
    const Tensor none;
    return {wanted[0] ? dq : none, wanted[1] ? dk : none, wanted[2] ? dv : none, wanted[3] ? dbias : none, none};
  }
};

}  // namespace
}  // namespace learning

using namespace learning;

at::Tensor differing(const at::Tensor& mask) {
  Tensor seen = mask;
  for (int64_t axis = 0; axis < 3; ++axis) {
    if (!mask.stride(axis) && mask.size(axis) > 1) seen = seen.narrow(axis, 0, 1);
  }
  return seen;
}

bool efficient(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
               std::optional<double> scale) {
  if (bias.dim() != 4 || bias.size(3) != k.size(2) || bias.size(3) % kColumns || !bias.stride(3)) return false;
  if (q.size(0) != k.size(0) || q.size(1) != k.size(1) || !at::isFloatingType(bias.scalar_type())) return false;
  Silent silent;  // Python asks again, and has these warnings
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  try {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor asked = loaded(bias, q, false).set_requires_grad(true);
    return at::_fused_sdp_choice(q, k, v, asked, 0.0, false, scale) == kEfficient;
  } catch (const std::exception&) {  // which Python is to raise
    return false;
  }
}

at::Tensor learned(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
                   std::optional<double> scale) {
  return Learned::apply(q, k, v, bias, scale);
}
