// The buffer type of the CPU backend in which weights of the d2q types lie interleaved. ggml's own multiplications take
// them from there: d2q-mul-mat.c for few columns, tiled.cpp and d2q_gemm for prompts.
#include "d2q-repack.h"
#include "d2q-repack-buffer.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-cpu/traits.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

static bool can_repack(const struct ggml_tensor * t) {
    return t->view_src == nullptr && t->ne[3] == 1 && ggml_is_contiguous(t) && d2q_can_repack(t->type, t->ne[1]);
}

static enum ggml_status init_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor * tensor) {
    // what d2q_is_repacked looks for; nothing dereferences it
    tensor->extra = can_repack(tensor) ? buffer->buft->context : nullptr;
    return GGML_STATUS_SUCCESS;
}

static void set_tensor(ggml_backend_buffer_t, struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor) && d2q_is_repacked(tensor));
    d2q_repack(tensor->type, tensor->ne[0], ggml_nrows(tensor), data, tensor->data);
}

static const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_D2Q";
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer == nullptr) {
        return nullptr;
    }
#if defined(__linux__)
    // the weights are read from beginning to end for every token: with large pages, fewer misses of the TLB stop that
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), base = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t first = (base + page - 1)/page*page, last = (base + size)/page*page;
    if (first < last) {
        madvise((void *) first, last - first, MADV_HUGEPAGE); // advice, which a system may not know
    }
#endif
    buffer->buft              = buft;
    buffer->iface.init_tensor = init_tensor;
    buffer->iface.set_tensor  = set_tensor;
    buffer->iface.get_tensor  = nullptr;
    buffer->iface.cpy_tensor  = nullptr;
    return buffer;
}

static size_t get_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

namespace {
class buffer_type : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const struct ggml_tensor * op) override {
        const struct ggml_tensor * weights = op->src[0], * x = op->src[1];
        const int dims = op->op == GGML_OP_MUL_MAT ? 2 : op->op == GGML_OP_MUL_MAT_ID ? 3 : 0;
        return dims != 0 && weights->buffer && weights->buffer->buft == ggml_backend_cpu_d2q_buffer_type()
            && ggml_n_dims(weights) <= dims && can_repack(weights) && x->type == GGML_TYPE_F32
            && (x->buffer == nullptr || ggml_backend_buft_is_host(x->buffer->buft));
    }

    // no functions of our own: the operation goes to ggml's, and their hooks find the interleaved weights
    ggml::cpu::tensor_traits * get_tensor_traits(const struct ggml_tensor *) override {
        return nullptr;
    }
};
}

ggml_backend_buffer_type_t ggml_backend_cpu_d2q_buffer_type(void) {
    static struct ggml_backend_buffer_type type = [] {
        d2q_repack_init();
        return ggml_backend_buffer_type {
            { get_name, alloc_buffer, get_alignment, nullptr, nullptr, nullptr },
            ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
            new buffer_type(),
        };
    }();
    return &type;
}
