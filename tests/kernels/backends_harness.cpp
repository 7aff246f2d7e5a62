// Asks ggml whether devices of several backends compute with our types, where each device itself says yes to everything,
// as SYCL's and RPC's do. Prints one line for each backend: its name, the answer for a stock type, for ours, for a copy
// to ours. The test compiles it against the installed libggml-base.

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cstdio>
#include <initializer_list>

static const char * name(ggml_backend_reg_t reg) {
    return (const char *) reg->context;
}

static bool yes(ggml_backend_dev_t, const ggml_tensor *) {
    return true;
}

int main(int argc, char ** argv) {
    ggml_context * ctx = ggml_init({ 1024*1024, nullptr, true });
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 256, 3);
    for (int i = 1; i < argc; i++) {
        ggml_backend_reg reg = {};
        reg.api_version    = GGML_BACKEND_API_VERSION;
        reg.iface.get_name = name;
        reg.context        = argv[i];
        ggml_backend_device device = {};
        device.iface.supports_op = yes;
        device.reg = &reg;
        ggml_tensor * stock = ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, 256, 5), x);
        printf("%s %d", argv[i], ggml_backend_dev_supports_op(&device, stock));
        for (ggml_type type : { GGML_TYPE_D2Q2, GGML_TYPE_D2Q3, GGML_TYPE_D2Q2_64, GGML_TYPE_D2Q3_64 }) {
            ggml_tensor * weights = ggml_new_tensor_2d(ctx, type, 256, 3);
            printf(" %d%d", ggml_backend_dev_supports_op(&device, ggml_mul_mat(ctx, weights, x)),
                            ggml_backend_dev_supports_op(&device, ggml_cpy(ctx, x, weights)));
        }
        printf("\n");
    }
    return 0;
}
