/* Max-pool's indices on CPUs: one pass over them each way. Loaded by windows.py, which says what is computed.
 *
 * Two dimensions are three with one plane. In memory the outputs are (outer, planes, rows, columns, inner): contiguous
 * with inner = 1, or channels last with the channels there.
 */

#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

typedef struct {
    int64_t outer, out[3], inner;                              /* the outputs */
    int64_t size[3], kernel[3], stride[3], padding[3], dilation[3]; /* of the input, and the window */
} Job;

/* `numbers`: the fields of a job, in order. */
static Job job_of(const int64_t *numbers) {
    Job job = {.outer = numbers[0], .inner = numbers[4]};
    for (int d = 0; d < 3; d++) {
        job.out[d] = numbers[1 + d];
        job.size[d] = numbers[5 + d], job.kernel[d] = numbers[8 + d], job.stride[d] = numbers[11 + d];
        job.padding[d] = numbers[14 + d], job.dilation[d] = numbers[17 + d];
    }
    return job;
}

static int64_t origin(const Job *job, int d, int64_t i) { return i * job->stride[d] - job->padding[d]; }

/* Which of a window's lines, `apart` from each other and the first at `from`, holds `*at`; which becomes its place in
 * the line. Of the last line is what lies in none. */
static int64_t line_of(int64_t lines, int64_t from, int64_t apart, int64_t length, int64_t *at) {
    *at -= from;
    int64_t line = 0;
    while (line + 1 < lines && (uint64_t)*at >= (uint64_t)length) *at -= apart, line++;
    return line;
}

EXPORT void dropit_encode_window(const int64_t *indices, uint8_t *codes, const int64_t *numbers, int threads) {
    const Job job = job_of(numbers);
    const int64_t *size = job.size, *kernel = job.kernel, *step = job.dilation, rows = job.out[1];
    int64_t row = job.out[2] * job.inner, count = job.outer * job.out[0] * rows;
#pragma omp parallel for num_threads(threads) if (count * row > 1 << 14)
    for (int64_t r = 0; r < count; r++) {
        int64_t first = origin(&job, 0, r / rows % job.out[0]) * size[1] * size[2];
        int64_t second = origin(&job, 1, r % rows) * size[2];
        for (int64_t i = 0; i < row; i++) {
            int64_t at = indices[r * row + i];
            int64_t plane = line_of(kernel[0], first, step[0] * size[1] * size[2], size[1] * size[2], &at);
            int64_t line = line_of(kernel[1], second, step[1] * size[2], size[2], &at);
            at -= origin(&job, 2, job.inner == 1 ? i : i / job.inner);
            if (step[2] != 1) at /= step[2];
            codes[r * row + i] = (uint8_t)((plane * kernel[1] + line) * kernel[2] + at);
        }
    }
}

EXPORT void dropit_decode_window(const uint8_t *codes, int64_t *indices, const int64_t *numbers, int threads) {
    const Job job = job_of(numbers);
    const int64_t *size = job.size, *kernel = job.kernel, *step = job.dilation, rows = job.out[1];
    int64_t row = job.out[2] * job.inner, count = job.outer * job.out[0] * rows, place[256];
    for (int64_t c = 0; c < 256; c++) /* of a cell, behind the window's origin */
        place[c] = (c / kernel[2] / kernel[1] % kernel[0] * step[0] * size[1] + c / kernel[2] % kernel[1] * step[1]) *
                       size[2] +
                   c % kernel[2] * step[2];
#pragma omp parallel for num_threads(threads) if (count * row > 1 << 14)
    for (int64_t r = 0; r < count; r++) {
        int64_t from = (origin(&job, 0, r / rows % job.out[0]) * size[1] + origin(&job, 1, r % rows)) * size[2];
        for (int64_t i = 0; i < row; i++)
            indices[r * row + i] =
                from + origin(&job, 2, job.inner == 1 ? i : i / job.inner) + place[codes[r * row + i]];
    }
}
