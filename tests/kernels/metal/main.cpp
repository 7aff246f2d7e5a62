// Runs one ggml operation on the emulated Metal device, or dequantizes as the CPU does. A request on standard input, the
// answer on standard output: a line with the names of the kernels that ran, then the result as floats.
//
// Request: int64 operation, then for each operand int64 type and int64 ne[4] (all zero: absent), then the operands' bytes.

#include "device.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml-metal-device.h"
#include "ggml-metal-ops.h"
#include "ggml.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

enum Operation { MUL_MAT, MUL_MAT_ID, GET_ROWS, DEQUANTIZE, COPY };

static void read_exactly(void * data, size_t size) {
    if (fread(data, 1, size, stdin) != size) {
        fprintf(stderr, "the request is too short\n");
        exit(2);
    }
}

// memory of a tensor, with pages before and after it that can't be accessed: it ends, or begins, where they begin or end
static void * guarded(size_t size, bool at_end) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), body = (size + page - 1)/page*page;
    char * map = (char *) mmap(nullptr, body + 2*page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) || mprotect(map + page + body, page, PROT_NONE)) {
        perror("mmap");
        exit(2);
    }
    return map + page + (at_end ? body - size : 0);
}

static void place(ggml_tensor * t, size_t size, bool at_end) {
    t->data = guarded(size, at_end);
    t->buffer = ggml_backend_cpu_buffer_from_ptr(guarded(64, false), 64);
}

static ggml_tensor * operand(ggml_context * ctx, const int64_t * described) {
    if (described[1] == 0) {
        return nullptr;
    }
    ggml_tensor * t = ggml_new_tensor(ctx, (ggml_type) described[0], 4, described + 1);
    // the stock kernels read up to a tile of rows past the last one, ours don't
    const bool stock = ggml_is_quantized(t->type) && t->type < GGML_TYPE_D2Q2;
    place(t, ggml_nbytes(t) + (stock ? 16*t->nb[1] : 0), true);
    read_exactly(t->data, ggml_nbytes(t));
    return t;
}

static void answer(const std::vector<float> & values) {
    printf("%s\n", dispatched_kernels().c_str());
    fwrite(values.data(), sizeof(float), values.size(), stdout);
}

int main() {
    ggml_context * ctx = ggml_init({ 1024*1024, nullptr, true });
    int64_t request[1 + 3*5];
    read_exactly(request, sizeof(request));
    ggml_tensor * a = operand(ctx, request + 1);
    ggml_tensor * b = operand(ctx, request + 6);
    ggml_tensor * c = operand(ctx, request + 11);

    if (request[0] == DEQUANTIZE) {
        std::vector<float> values(ggml_nelements(a));
        ggml_get_type_traits(a->type)->to_float(a->data, values.data(), (int64_t) values.size());
        answer(values);
        return 0;
    }

    ggml_tensor * op = request[0] == MUL_MAT    ? ggml_mul_mat(ctx, a, b)
                     : request[0] == MUL_MAT_ID ? ggml_mul_mat_id(ctx, a, b, c)
                     : request[0] == GET_ROWS   ? ggml_get_rows(ctx, a, b)
                                                : ggml_cpy(ctx, a, b);
    op->flags |= GGML_TENSOR_FLAG_COMPUTE;
    const size_t scratch = request[0] == MUL_MAT_ID ? ggml_metal_op_mul_mat_id_extra_tpe(op) + ggml_metal_op_mul_mat_id_extra_ids(op) + ggml_metal_op_mul_mat_id_extra_amax(op) : 0;
    place(op, ggml_nbytes(op) + scratch, true);
    memset(op->data, 0xFF, ggml_nbytes(op) + scratch); // NaN: what no thread writes shows

    ggml_metal_device_t device = ggml_metal_device_get(0, 1);
    if (!ggml_metal_device_supports_op(device, op)) {
        printf("unsupported\n");
        return 0;
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_graph_add_node(graph, op);
    ggml_metal_op_t encoding = ggml_metal_op_init(device, nullptr, graph, ggml_metal_device_get_fusion_info(device), 0, 1, false, false, 0);
    ggml_metal_op_encode(encoding, 0);
    ggml_metal_op_free(encoding);
    const float * result = (const float *) op->data;
    answer(std::vector<float>(result, result + ggml_nelements(op)));
    return 0;
}
