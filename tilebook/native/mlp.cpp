// An MLP block that is PyTorch's to serve: the calls of its three functions, with one node of autograd for five.
//
// Those are the calls that PyTorch makes of its linear, its activation and their gradients, below autograd, so that the
// bits are the same. What is kept for the gradient is what the three would keep. A gradient that is to be differentiated
// again is made of functions that autograd records.

#include "autocast.h"
#include "shared.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <vector>

namespace blocks {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using Tensors = std::vector<Tensor>;

const char* approximation(Activation which) { return which == Activation::gelu_tanh ? "tanh" : "none"; }

Tensor activated(const Tensor& z, Activation which) {
  return which == Activation::relu ? at::relu(z) : at::gelu(z, approximation(which));
}

Tensor rows_of(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

Tensor shaped(const Tensor& rows, const Tensor& like) {
  if (like.dim() == 2) return rows;
  auto sizes = like.sizes().vec();
  sizes.back() = rows.size(1);
  return rows.view(sizes);
}

// A value, whose gradient is that of what it is known to be equal to.
struct Known : torch::autograd::Function<Known> {
  static Tensor forward(AutogradContext* ctx, const Tensor& computed, const Tensor& value) {
    ctx->set_materialize_grads(false);
    return value;
  }
  static Tensors backward(AutogradContext* ctx, Tensors gradients) { return {gradients[0], Tensor()}; }
};

// What the products are of: the weights and biases, or their casts.
struct Factors {
  Tensor w1, b1, w2, b2;
};

// Gradients go to the weights and biases that are given, in their dtype.
struct Block : torch::autograd::Function<Block> {
  enum { kX, kW1, kB1, kW2, kB2, kTensors };

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& to_w1, const Tensor& to_b1,
                        const Tensor& to_w2, const Tensor& to_b2, const Factors& factors, int64_t activation) {
    const auto& [w1, b1, w2, b2] = factors;
    const auto number = [](const Tensor& each) { return static_cast<int64_t>(each.scalar_type()); };
    ctx->saved_data["dtypes"] =
        std::vector<int64_t>{number(x), number(to_w1), number(to_b1), number(to_w2), number(to_b2)};
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto which = static_cast<Activation>(activation);
    ctx->set_materialize_grads(false);
    ctx->saved_data["activation"] = activation;
    const Tensor z = at::addmm(b1, rows_of(x), w1.t());
    const Tensor h = activated(z, which);
    // Not `needs_input_grad`, which tells what a backward pass is asked for, if this runs inside of one.
    const bool first = x.requires_grad() || to_w1.requires_grad() || to_b1.requires_grad();
    const bool relu = which == Activation::relu, last = to_w2.requires_grad();
    const Tensor none;
    ctx->save_for_backward({to_w1.requires_grad() ? x : none, x.requires_grad() ? w1 : none,
                            first && !relu ? z : none, last || (first && relu) ? h : none, first ? w2 : none});
    return shaped(at::addmm(b2, h, w2.t()), x);
  }

  static Tensors backward(AutogradContext* ctx, Tensors gradients) {
    const auto& dy = gradients[0];
    Tensors found(kTensors + 2);
    if (!dy.defined()) return found;
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &w1 = saved[1], &z = saved[2], &h = saved[3], &w2 = saved[4];
    const auto which = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    const bool twice = at::GradMode::is_enabled();
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    const bool traced = twice || !ordinary(dy, dy.device().type());
    if (!traced) below.emplace();
    const auto dtypes = ctx->saved_data["dtypes"].toIntVector();
    const auto dtype = [&](size_t index) { return static_cast<at::ScalarType>(dtypes[index]); };
    const auto summed = [&](const Tensor& each, at::ScalarType to) {
      return traced || each.scalar_type() == to ? at::sum(each, 0).to(to) : column_sum(each, to);
    };
    const Tensor rows = rows_of(dy);
    const bool first = ctx->needs_input_grad(kX) || ctx->needs_input_grad(kW1) || ctx->needs_input_grad(kB1);
    Tensor before = which == Activation::relu ? h : z, after = h;
    if (twice) std::tie(before, after) = recorded(which, dy, x, w1, before, after);
    if (ctx->needs_input_grad(kW2)) found[kW2] = product(rows.t(), after, dtype(kW2), traced);
    if (ctx->needs_input_grad(kB2)) found[kB2] = summed(rows, dtype(kB2));
    if (!first) return found;
    const Tensor dh = at::mm(rows, w2);
    const Tensor dz = which == Activation::relu ? at::threshold_backward(dh, before, 0)
                                                : at::gelu_backward(dh, before, approximation(which));
    if (ctx->needs_input_grad(kX)) found[kX] = shaped(at::mm(dz, w1), dy);
    if (ctx->needs_input_grad(kW1)) found[kW1] = product(dz.t(), rows_of(x), dtype(kW1), traced);
    if (ctx->needs_input_grad(kB1)) found[kB1] = summed(dz, dtype(kB1));
    return found;
  }

  // z, or relu(z), and h, of the numbers they have, as functions of x, W1 and b1, whichever of their gradients are asked
  // for now. What was not kept of these stands for its edge: its numbers are in nobody's gradient.
  static std::tuple<Tensor, Tensor> recorded(Activation which, const Tensor& dy, const Tensor& x, const Tensor& w1,
                                             const Tensor& kept, const Tensor& h) {
    const auto node = torch::autograd::get_current_node();
    const auto needed = [&](size_t index) { return node->next_edge(index).is_valid(); };
    if (!needed(kX) && !needed(kW1) && !needed(kB1)) return {kept, h};
    const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros({1}, kept.options()).expand(sizes); };
    const auto standing = [&](size_t index, at::IntArrayRef sizes) {
      Tensor made = zeros(sizes).detach();
      if (needed(index)) torch::autograd::impl::set_gradient_edge(made, node->next_edge(index));
      return made;
    };
    const int64_t inner = kept.size(1);
    Tensor sum = zeros({kept.size(0), inner});
    if (x.defined() || w1.defined()) {
      auto sizes = dy.sizes().vec();
      sizes.back() = x.defined() ? x.size(-1) : w1.size(1);
      const Tensor given = x.defined() ? x : standing(kX, sizes);
      sum = at::mm(rows_of(given), (w1.defined() ? w1 : standing(kW1, {inner, sizes.back()})).t());
    }
    if (needed(kB1)) sum = sum.add(standing(kB1, {inner}));
    if (which == Activation::relu) return {kept, Known::apply(at::threshold_backward(sum, kept, 0), kept)};
    const Tensor z = Known::apply(sum, kept);
    return {z, activated(z, which)};
  }
};

// Does PyTorch's linear make one product of each, of rows that lie in memory as they are?
bool one_product(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  if ((x.dim() != 2 && x.dim() != 3) || w1.dim() != 2 || w2.dim() != 2 || b1.dim() != 1 || b2.dim() != 1) return false;
  const int64_t width = x.size(-1), inner = w1.size(0);
  if (w1.size(1) != width || b1.size(0) != inner || w2.size(1) != inner || b2.size(0) != w2.size(0)) return false;
  const auto dtype = x.scalar_type();
  for (const Tensor* each : {&x, &w1, &b1, &w2, &b2}) {
    if (each->scalar_type() != dtype || each->device() != x.device() || !each->is_contiguous()) return false;
    if (!ordinary(*each, x.device().type()) || each->_fw_grad(0).defined()) return false;
  }
  if (!at::isFloatingType(dtype) || !width || !inner || !w2.size(0)) return false;
  // By strides PyTorch chooses how a gradient is computed, even where a dimension is of one.
  const int64_t rows = x.numel() / width;
  if (rows * width <= 1 || rows * inner <= 1 || x.stride(-1) != 1 || x.stride(-2) != width) return false;
  if (x.dim() == 3 && x.stride(0) != x.size(1) * width) return false;
  return w1.stride(1) == 1 && w1.stride(0) == width && w2.stride(1) == 1 && w2.stride(0) == inner;
}

Tensor computed(const Tensor& x, const Factors& factors, const Factors& targets, Activation which) {
  const auto& [w1, b1, w2, b2] = factors;
  if (!one_product(x, w1, b1, w2, b2)) return at::linear(activated(at::linear(x, w1, b1), which), w2, b2);
  const auto wanted = [](const Tensor& each) { return each.requires_grad(); };
  if (at::GradMode::is_enabled() && (wanted(x) || wanted(w1) || wanted(b1) || wanted(w2) || wanted(b2))) {
    return Block::apply(x, targets.w1, targets.b1, targets.w2, targets.b2, factors, static_cast<int64_t>(which));
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor h = activated(at::addmm(b1, rows_of(x), w1.t()), which);
  return shaped(at::addmm(b2, h, w2.t()), x);
}

}  // namespace
}  // namespace blocks

using namespace blocks;

at::Tensor mlp(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, Activation which) {
  const auto device = x.device().type();
  const Factors given{w1, b1, w2, b2};
  if (!at::autocast::is_autocast_enabled(device)) return computed(x, given, given, which);
  const c10::impl::ExcludeDispatchKeyGuard below(device == c10::kCPU ? c10::DispatchKey::AutocastCPU
                                                                     : c10::DispatchKey::AutocastCUDA);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const Factors casts{casted(dtype, w1, device), casted(dtype, b1, device), casted(dtype, w2, device),
                      casted(dtype, b2, device)};
  const Factors targets{target(w1, casts.w1), target(b1, casts.b1), target(w2, casts.w2), target(b2, casts.b2)};
  return computed(at::autocast::cached_cast(dtype, x, device), casts, targets, which);
}
