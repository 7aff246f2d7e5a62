// Which backends have the d2q types, for ggml-backend.cpp. All others must not be asked: most name the types that they
// can compute with, but some name those that they can't, or say yes to everything, and then abort (README.md).
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <string.h>

static inline bool d2q_is_type(enum ggml_type type) {
    return type >= GGML_TYPE_D2Q2 && type <= GGML_TYPE_D2Q3_64;
}

static inline bool d2q_is_in(const struct ggml_tensor * op) {
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (op->src[i] != NULL && d2q_is_type(op->src[i]->type)) {
            return true;
        }
    }
    return d2q_is_type(op->type);
}

// MTL is Metal; BLAS multiplies what the CPU has dequantized; a device without a backend is made of others and asks them
static inline bool d2q_backend_declines(ggml_backend_dev_t device, const struct ggml_tensor * op) {
    static const char * const have[] = { "CPU", "MTL", "BLAS" };
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    if (reg == NULL || !d2q_is_in(op)) {
        return false;
    }
    for (size_t i = 0; i < sizeof(have)/sizeof(have[0]); i++) {
        if (strcmp(ggml_backend_reg_name(reg), have[i]) == 0) {
            return false;
        }
    }
    return true;
}
