/* Max-pool's indices on CPUs: one pass over them each way. Loaded by windows.py, which says what is computed.
 *
 * Two dimensions are three with one plane. In memory the outputs are (outer, planes, rows, columns, inner): contiguous
 * with inner = 1, or channels last with the channels there. Sizes fit in 32 bits.
 */

#include <stdint.h>

#include "common.h"

typedef struct {
    int64_t outer, out[3], inner;                                       /* the outputs */
    int32_t size[3], kernel[3], stride[3], padding[3], dilation[3]; /* of the input, and the window */
} Job;

/* `numbers`: the fields of a job, in order. */
static Job job_of(const int64_t *numbers) {
    Job job = {.outer = numbers[0], .inner = numbers[4]};
    for (int d = 0; d < 3; d++) {
        job.out[d] = numbers[1 + d];
        job.size[d] = (int32_t)numbers[5 + d];
        job.kernel[d] = (int32_t)numbers[8 + d];
        job.stride[d] = (int32_t)numbers[11 + d];
        job.padding[d] = (int32_t)numbers[14 + d];
        job.dilation[d] = (int32_t)numbers[17 + d];
    }
    return job;
}

static int32_t origin(const Job *job, int d, int64_t i) { return (int32_t)i * job->stride[d] - job->padding[d]; }

/* Which of a window's lines holds `at`; they are `apart` from each other. */
INLINE int32_t line_of(int32_t at, int32_t lines, int32_t apart) {
    int32_t line = 0;
    for (int32_t l = 1; l < lines; l++) line += at >= l * apart;
    return line;
}

/* `n` outputs whose windows begin in the line at `from`, in columns `stride` apart. */
INLINE void encode_run(const Job *job, const int64_t *indices, uint8_t *codes, int64_t n, int64_t from, int32_t column,
                       int32_t stride, int32_t planes, int32_t lines, int32_t step) {
    int32_t line_apart = job->dilation[1] * job->size[2];
    int32_t plane_apart = job->dilation[0] * job->size[1] * job->size[2];
    for (int32_t i = 0; i < (int32_t)n; i++) {
        int32_t at = (int32_t)(indices[i] - from);
        int32_t plane = line_of(at, planes, plane_apart);
        at -= plane * plane_apart;
        int32_t line = line_of(at, lines, line_apart);
        at -= line * line_apart + column + i * stride;
        codes[i] = (uint8_t)((plane * lines + line) * job->kernel[2] + at / step);
    }
}

/* The usual windows have loops of known length. */
INLINE void encode_columns(const Job *job, const int64_t *indices, uint8_t *codes, int64_t n, int64_t from,
                           int32_t column, int32_t stride) {
    int32_t planes = job->kernel[0], lines = job->kernel[1], step = job->dilation[2];
    if (planes == 1 && lines == 2 && step == 1)
        encode_run(job, indices, codes, n, from, column, stride, 1, 2, 1);
    else if (planes == 1 && lines == 3 && step == 1)
        encode_run(job, indices, codes, n, from, column, stride, 1, 3, 1);
    else
        encode_run(job, indices, codes, n, from, column, stride, planes, lines, step);
}

INLINE void encode_row(const Job *job, const int64_t *indices, uint8_t *codes, int64_t from) {
    if (job->inner == 1)
        encode_columns(job, indices, codes, job->out[2], from, origin(job, 2, 0), job->stride[2]);
    else
        for (int64_t c = 0; c < job->out[2]; c++)
            encode_columns(job, indices + c * job->inner, codes + c * job->inner, job->inner, from, origin(job, 2, c), 0);
}

INLINE void decode_row(const Job *job, const uint8_t *codes, int64_t *indices, int64_t from, const int32_t *place) {
    for (int64_t c = 0; c < job->out[2]; c++, codes += job->inner, indices += job->inner)
        for (int64_t i = 0; i < job->inner; i++) indices[i] = from + origin(job, 2, c) + place[codes[i]];
}

#define WORKER(suffix, attribute)                                                                                \
    attribute static void encode_##suffix(const Job *job, const int64_t *indices, uint8_t *codes, int64_t from) { \
        encode_row(job, indices, codes, from);                                                                   \
    }

WORKER(plain, )
#ifdef X86
WORKER(avx2, __attribute__((target("avx2"))))
#endif

/* Where the first line of the windows of row r of all rows begins, its columns not counted. */
static int64_t line_from(const Job *job, int64_t r) {
    int64_t rows = job->out[1], plane = origin(job, 0, r / rows % job->out[0]);
    return (plane * job->size[1] + origin(job, 1, r % rows)) * job->size[2];
}

EXPORT void dropit_encode_window(const int64_t *indices, uint8_t *codes, const int64_t *numbers, int threads) {
    const Job job = job_of(numbers);
    int64_t row = job.out[2] * job.inner, count = job.outer * job.out[0] * job.out[1];
#pragma omp parallel for num_threads(threads) if (count * row > 1 << 14)
    for (int64_t r = 0; r < count; r++) BEST(encode)(&job, indices + r * row, codes + r * row, line_from(&job, r));
}

EXPORT void dropit_decode_window(const uint8_t *codes, int64_t *indices, const int64_t *numbers, int threads) {
    const Job job = job_of(numbers);
    const int32_t *size = job.size, *kernel = job.kernel, *step = job.dilation;
    int64_t row = job.out[2] * job.inner, count = job.outer * job.out[0] * job.out[1];
    int32_t place[256]; /* of a cell, behind the window's origin */
    for (int32_t c = 0; c < 256; c++) {
        int32_t line = c / kernel[2];
        place[c] = (line / kernel[1] % kernel[0] * step[0] * size[1] + line % kernel[1] * step[1]) * size[2] +
                   c % kernel[2] * step[2];
    }
#pragma omp parallel for num_threads(threads) if (count * row > 1 << 14)
    for (int64_t r = 0; r < count; r++) decode_row(&job, codes + r * row, indices + r * row, line_from(&job, r), place);
}
