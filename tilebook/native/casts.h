#pragma once

#include <ATen/core/Tensor.h>

// Is it nothing but its memory, on a device of this kind: of no subclass, no transform, no lazy negation?
bool ordinary(const at::Tensor& tensor, c10::DeviceType kind);

// Turns it on for the GPU, or for the CPU, as tests do, or off.
void casts_on(bool on, bool cpu);
