#pragma once

// Turns it on for the GPU, or for the CPU, as tests do, or off.
void layouts_on(bool on, bool cpu);
