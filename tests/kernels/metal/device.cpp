// A Metal device for ggml's host code: implements what ggml-metal-ops.cpp and ggml-metal-device.cpp call in
// ggml-metal-device.m. A dispatch runs at once, on the CPU, in emulation.cpp. Knows no operation and no kernel.

#include "device.h"
#include "emulation.h"

#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-impl.h"
#include "ggml-metal-ops.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

// values of function constants, by their number
struct ggml_metal_cv {
    std::map<int, std::vector<char>> values;
};

struct ggml_metal_pipeline {
    std::string name;
    emulation::Entry entry;
    ggml_metal_cv constants;
};

struct ggml_metal_library {
    ggml_metal_device_t device;
    std::map<std::string, ggml_metal_pipeline> pipelines;
};

struct ggml_metal_encoder {
    ggml_metal_pipeline_t pipeline;
    emulation::Dispatch dispatch;
    std::map<int, std::vector<char>> bytes;
};

struct ggml_metal_device {
    ggml_metal_device_props props;
    ggml_metal_library library;
    ggml_metal_fusion_info * fusion;
};

// ggml_metal_device_supports_op as it stands in ggml-metal-device.m, where nothing of it is Objective-C
#include "supports_op.inc"

static std::string dispatched;

std::string & dispatched_kernels() {
    return dispatched;
}

// ---- device: what Apple's GPUs since the M1 can do ----

ggml_metal_device_t ggml_metal_device_init(int, int) {
    ggml_metal_device_t device = new ggml_metal_device();
    device->props.max_theadgroup_memory_size = 32*1024;
    device->props.has_simdgroup_reduction    = true;
    device->props.has_simdgroup_mm           = true;
    device->library.device = device;
    device->fusion = ggml_metal_fusion_info_init(false, 0);
    return device;
}

void ggml_metal_device_free(ggml_metal_device_t device) {
    ggml_metal_fusion_info_free(device->fusion);
    delete device;
}

ggml_metal_library_t            ggml_metal_device_get_library(ggml_metal_device_t device)      { return &device->library; }
const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t device)        { return &device->props; }
ggml_metal_fusion_info *        ggml_metal_device_get_fusion_info(ggml_metal_device_t device)  { return device->fusion; }
ggml_metal_device_t             ggml_metal_library_get_device(ggml_metal_library_t library)    { return library->device; }

// memory is shared: an address is an offset
ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) {
    return { nullptr, (size_t) t->data };
}

// ---- pipelines ----

ggml_metal_cv_t ggml_metal_cv_init(void)               { return new ggml_metal_cv(); }
void            ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }

template <typename T>
static void set(ggml_metal_cv_t cv, T value, int32_t index) {
    const char * bytes = (const char *) &value;
    cv->values[index].assign(bytes, bytes + sizeof(T));
}

void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t index) { set(cv, value, index); }
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t index) { set(cv, value, index); }
void ggml_metal_cv_set_bool (ggml_metal_cv_t cv, bool    value, int32_t index) { set(cv, value, index); }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t library, const char * name) {
    const auto found = library->pipelines.find(name);
    ggml_metal_pipeline_with_params result = {};
    result.pipeline = found == library->pipelines.end() ? nullptr : &found->second;
    return result;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t library, const char * base, const char * name, ggml_metal_cv_t cv) {
    const auto found = emulation::kernels().find(base);
    if (found == emulation::kernels().end()) {
        GGML_ABORT("there is no kernel %s", base);
    }
    library->pipelines[name] = { base, found->second, cv ? *cv : ggml_metal_cv() };
    return ggml_metal_library_get_pipeline(library, name);
}

void ggml_metal_pipeline_free(ggml_metal_pipeline_t) {}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) {
    return 1024;
}

// ---- encoder ----

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) { return new ggml_metal_encoder(); }
void ggml_metal_encoder_free(ggml_metal_encoder_t encoder)               { delete encoder; }
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t)               {}
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t)             {}
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t)               {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) {
    encoder->pipeline = pipeline.pipeline;
}

static void set_argument(ggml_metal_encoder_t encoder, void * data, int index) {
    auto & buffers = encoder->dispatch.buffers;
    if ((int) buffers.size() <= index) {
        buffers.resize(index + 1);
    }
    buffers[index] = data;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int index) {
    std::vector<char> & bytes = encoder->bytes[index];
    bytes.assign((char *) data, (char *) data + size);
    set_argument(encoder, bytes.data(), index);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int index) {
    set_argument(encoder, (char *) buffer.metal + buffer.offs, index);
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int) {
    GGML_ASSERT(size <= 32*1024);
    encoder->dispatch.threadgroup_memory = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t encoder, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    const ggml_metal_pipeline & pipeline = *encoder->pipeline;
    for (const emulation::Constant & constant : pipeline.entry.library->constants) {
        const auto given = pipeline.constants.values.find(constant.index);
        memset(constant.value, 0, constant.size);
        if (given != pipeline.constants.values.end()) {
            GGML_ASSERT(given->second.size() == constant.size);
            memcpy(constant.value, given->second.data(), constant.size);
        }
    }
    encoder->dispatch.grid    = { tg0, tg1, tg2 };
    encoder->dispatch.threads = { tptg0, tptg1, tptg2 };
    dispatched += (dispatched.empty() ? "" : " ") + pipeline.name;
    emulation::run(pipeline.entry.kernel, encoder->dispatch);
}
