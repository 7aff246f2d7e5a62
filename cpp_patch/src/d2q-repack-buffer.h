// The buffer type of interleaved weights, for the CPU backend's list of extra buffer types.
#pragma once

#include "ggml-backend.h"

ggml_backend_buffer_type_t ggml_backend_cpu_d2q_buffer_type(void);
