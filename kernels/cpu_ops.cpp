// The CPU kernels behind kernels/cpu_ops.py: a plain C interface, independent of torch's.
//
// The same code (cpu_ops.inc) is compiled for three instruction sets; the best one that the
// processor has is chosen when the library is loaded. Everything is fp32, and every row's result
// depends on that row alone, in one fixed order of operations: neither the number of rows nor the
// number of threads changes a bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
#endif

namespace {

// What one call of attention works on; all sizes count elements. Mirrored in cpu_ops.py.
struct AttentionArgs {
    const float *query;  // row stride query_stride, heads next to each other
    const float *keys;   // [block, slot, head, dim], strides below
    const float *values;
    float *output;  // [row, query head, dim]
    const float *sinks;  // [query head], or null
    const int64_t *first_row;  // [request]
    const int64_t *num_rows;
    const int64_t *context_len;
    const int64_t *tables;        // all block tables, one after the other
    const int64_t *table_start;  // [request]
    int64_t num_requests;
    int64_t query_stride;
    int64_t num_query_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int64_t block_stride;
    int64_t slot_stride;
    int64_t window;  // 0: none
    float scale;
    float softcap;  // 0: none
};

// Rotary embedding of queries in place, and of keys on their way into their slots.
struct RotaryArgs {
    float *qkv;  // [row, (query heads + 2 kv heads) * dim]
    const float *cos;  // [row, rotary dim]
    const float *sin;
    const float *query_norm;  // [dim], or null: RMS norm per head before the rotation
    const float *key_norm;
    float *keys;
    float *values;
    const int64_t *blocks;   // [row]
    const int64_t *offsets;  // [row]
    int64_t num_rows;
    int64_t num_query_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t rotary_dim;
    int64_t block_stride;
    int64_t slot_stride;
    float eps;
};

// y = x W^T + bias, with W as kernels/cpu_linear.py packs it; see cpu_linear.inc.
struct LinearArgs {
    const float *x;  // row stride x_stride
    const void *weights;
    const float *scales;  // [out, filled up to whole panels], of int8 weights; else null
    const float *bias;    // likewise, or null
    float *y;             // [row, out]
    int64_t num_rows;
    int64_t x_stride;
    int64_t in;
    int64_t out;
    int64_t storage;
};

enum Storage { FLOAT32, BFLOAT16, FLOAT16, INT8 };

constexpr int64_t PANEL = 64;      // outputs that lie next to each other
constexpr int64_t CHUNK = 128;     // inputs per pass: with PANEL outputs they fit the first cache
constexpr int64_t MAX_ROWS = 240;  // whose inputs and sums fit the second cache
constexpr int64_t FEW_ROWS = 30;   // up to here nothing needs to be laid out for them

constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t KEY_TILE = 64;    // keys whose scores are computed together, on a fixed grid
constexpr int64_t ROW_BLOCK = 96;   // (row, head) pairs that share one packed tile of keys
constexpr int64_t PARALLEL_ROWS = 32;  // fewer are not worth waking threads for

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BATON_MULTI 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define LANES 16
#define VECTORS 4
namespace avx512 {
#include "cpu_ops.inc"
#include "cpu_linear.inc"
}
#undef LANES
#undef VECTORS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define VECTORS 2
namespace avx2 {
#include "cpu_ops.inc"
#include "cpu_linear.inc"
}
#undef LANES
#undef VECTORS
#pragma GCC pop_options
#endif

#define LANES 4
#define VECTORS 2
namespace plain {
#include "cpu_ops.inc"
#include "cpu_linear.inc"
}
#undef LANES
#undef VECTORS

namespace {

int best() {
#ifdef BATON_MULTI
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

int isa = best();

}  // namespace

#ifdef BATON_MULTI
#define DISPATCH(call) (isa == 2 ? avx512::call : isa == 1 ? avx2::call : plain::call)
#else
#define DISPATCH(call) plain::call
#endif

extern "C" {

// Raised whenever an interface or the bits of any result change; kernels/cpu_ops.py has it too.
int baton_version() { return 2; }

// 2: AVX-512, 1: AVX2, 0: what every processor of the architecture has.
int baton_isa() { return isa; }

// Use a lower instruction set than the best one; for tests.
void baton_set_isa(int wanted) { isa = wanted < best() ? wanted : best(); }

// Heads whose size is no multiple of 16 take the widest vectors that divide it.
void baton_attention(const AttentionArgs *args) {
#ifdef BATON_MULTI
    if (isa == 2 && args->head_dim % 16 == 0) return avx512::attention(*args);
    if (isa >= 1 && args->head_dim % 8 == 0) return avx2::attention(*args);
#endif
    plain::attention(*args);
}

void baton_rotary(const RotaryArgs *args) { DISPATCH(rotary(*args)); }

void baton_linear(const LinearArgs *args) { DISPATCH(linear(*args)); }

// residual += branch (if there is one), then output = RMS norm of the residual.
void baton_add_norm(float *residual, const float *branch, const float *weight, float *output,
                    int64_t num_rows, int64_t dim, float eps) {
    DISPATCH(add_norm(residual, branch, weight, output, num_rows, dim, eps));
}

// output[row, i] = silu(input[row, i]) * input[row, dim + i]
void baton_silu_mul(const float *input, float *output, int64_t num_rows, int64_t dim) {
    DISPATCH(silu_mul(input, output, num_rows, dim));
}

// The same with GELU, approximated with tanh.
void baton_gelu_mul(const float *input, float *output, int64_t num_rows, int64_t dim) {
    DISPATCH(gelu_mul(input, output, num_rows, dim));
}

// The lowest kept logit of each row; see kernels/sampling.py.
void baton_filter_floor(const float *logits, const int64_t *top_k, const double *top_p,
                        const double *min_p, float *floors, int64_t num_rows, int64_t size) {
    DISPATCH(filter_floor(logits, top_k, top_p, min_p, floors, num_rows, size));
}

// argmax of logit + noise over what is at least the row's floor, ties to the lowest id.
void baton_gumbel_argmax(const float *logits, const float *floors, const uint32_t *keys,
                         int64_t *tokens, int64_t num_rows, int64_t size) {
    DISPATCH(gumbel_argmax(logits, floors, keys, tokens, num_rows, size));
}
}
