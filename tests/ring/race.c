/* ring.c under the sanitizers: `race peers` runs writer and reader as two threads, `race flips`
 * damages every byte of a control block that ends where its allocation ends. Exits 0 if all is
 * well.
 */
#define _GNU_SOURCE
#include "ring.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_SLOTS = 3, MAX_TOKENS = 16, WIDTH = 24 };

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct job {
    struct ring_control *control;
    uint32_t (*payload)[MAX_TOKENS * WIDTH];
    uint64_t total;
    uint64_t close_after; /* the reader leaves after so many slots; 0: never */
    enum ring_record_kind last;
};

static struct ring_control *make_control(uint64_t start_seq) {
    size_t nbytes = ring_control_bytes(NUM_SLOTS);
    struct ring_control *control = aligned_alloc(128, nbytes);
    struct ring_geometry geometry = {.num_slots = NUM_SLOTS, .max_tokens = MAX_TOKENS};
    uint64_t tensor_bytes = sizeof(uint32_t) * MAX_TOKENS * WIDTH;
    CHECK(control != NULL);
    memset(control, 0, nbytes);
    geometry.slot_bytes = tensor_bytes;
    geometry.max_sequences = MAX_TOKENS;
    geometry.start_seq = start_seq;
    geometry.num_tensors = 1;
    geometry.tensors[0] = (struct ring_tensor){"features", 1, 4, WIDTH, 0, tensor_bytes};
    ring_format(control, &geometry);
    return control;
}

static struct ring_micro_batch describe(uint64_t index) {
    return (struct ring_micro_batch){index / 7,  index,    index / 2, index * 0x9e3779b97f4a7c15u,
                                     index % 17, index % 5};
}

static enum ring_status wait_long(struct ring_end *end, ring_check *check) {
    return ring_wait(end, check, ring_now_ns() + 60000000000u);
}

static void *write_all(void *argument) {
    struct job *job = argument;
    struct ring_end end;
    CHECK(ring_open(&end, job->control, ring_control_bytes(NUM_SLOTS), true) == NULL);
    for (uint64_t index = 0; index < job->total; index++) {
        enum ring_status status = wait_long(&end, ring_check_free);
        if (status == RING_CLOSED && job->close_after)
            return NULL;
        CHECK(status == RING_READY);
        struct ring_micro_batch what = describe(index);
        uint32_t *slot = job->payload[ring_slot_of(&end, end.published)];
        for (uint64_t i = 0; i < what.num_tokens * WIDTH; i++)
            slot[i] = (uint32_t)(index * 31 + i);
        ring_stage(&end, &what);
        CHECK(ring_publish(&end) == RING_READY);
    }
    ring_leave_record(&end, job->last, "boom", 4);
    ring_set_phase(&end, RING_ENDED);
    CHECK(wait_long(&end, ring_check_closed) == RING_CLOSED);
    return NULL;
}

static void *read_all(void *argument) {
    struct job *job = argument;
    struct ring_end end;
    uint64_t index = 0;
    enum ring_status status;
    CHECK(ring_open(&end, job->control, ring_control_bytes(NUM_SLOTS), false) == NULL);
    while ((status = wait_long(&end, ring_check_full)) == RING_READY) {
        struct ring_micro_batch expected = describe(index);
        uint32_t *slot = job->payload[ring_slot_of(&end, end.taken - 1)];
        CHECK(memcmp(&end.header.what, &expected, sizeof expected) == 0);
        for (uint64_t i = 0; i < expected.num_tokens * WIDTH; i++)
            CHECK(slot[i] == (uint32_t)(index * 31 + i));
        memset(slot, 0xff, sizeof *job->payload);
        index++;
        CHECK(ring_release(&end, 1) == RING_READY);
        if (index == job->close_after)
            break;
    }
    if (!job->close_after) {
        CHECK(index == job->total);
        CHECK(status == (job->last == RING_RECORD_END ? RING_END : RING_ERROR));
        CHECK(end.record.length == 4 && memcmp(end.record.text, "boom", 4) == 0);
    }
    ring_leave_record(&end, RING_RECORD_CLOSE, "", 0);
    return NULL;
}

static void run_peers(struct job job, uint64_t start_seq) {
    pthread_t writer, reader;
    job.control = make_control(start_seq);
    job.payload = calloc(NUM_SLOTS, sizeof *job.payload);
    pthread_create(&writer, NULL, write_all, &job);
    pthread_create(&reader, NULL, read_all, &job);
    pthread_join(writer, NULL);
    pthread_join(reader, NULL);
    free(job.control);
    free(job.payload);
}

static void read_damaged(struct ring_control *control) {
    struct ring_end end;
    int num_taken = 0;
    if (ring_open(&end, control, ring_control_bytes(NUM_SLOTS), false) != NULL)
        return;
    while (ring_wait(&end, ring_check_full, 0) == RING_READY) {
        CHECK(++num_taken <= NUM_SLOTS);
        CHECK(ring_slot_of(&end, end.taken - 1) < NUM_SLOTS);
        CHECK(end.header.what.num_tokens <= MAX_TOKENS);
        if (num_taken < NUM_SLOTS && ring_release(&end, 1) != RING_READY)
            return;
    }
}

static void write_damaged(struct ring_control *control, const struct ring_end *pristine) {
    struct ring_micro_batch what = describe(5);
    struct ring_end end = *pristine;
    end.control = control;
    for (int i = 0; i <= NUM_SLOTS; i++) {
        if (ring_wait(&end, ring_check_free, 0) != RING_READY)
            break;
        CHECK(i < NUM_SLOTS);
        ring_stage(&end, &what);
        if (ring_publish(&end) != RING_READY)
            break;
    }
    ring_leave_record(&end, RING_RECORD_END, "", 0);
    ring_wait(&end, ring_check_closed, 0);
}

static void run_flips(void) {
    static const unsigned char patterns[] = {0x01, 0x80, 0x7f, 0xff};
    size_t nbytes = ring_control_bytes(NUM_SLOTS);
    struct ring_control *control = make_control(0);
    unsigned char *pristine = malloc(nbytes);
    struct ring_end writer, reader;
    CHECK(ring_open(&writer, control, nbytes, true) == NULL);
    for (uint64_t index = 0; index < 2; index++) {
        struct ring_micro_batch what = describe(index + 3);
        ring_stage(&writer, &what);
        CHECK(ring_publish(&writer) == RING_READY);
    }
    ring_leave_record(&writer, RING_RECORD_ERROR, "boom", 4);
    CHECK(ring_open(&reader, control, nbytes, false) == NULL);
    ring_leave_record(&reader, RING_RECORD_CLOSE, "", 0);
    memcpy(pristine, control, nbytes);
    for (int has_close = 0; has_close < 2; has_close++)
        for (size_t i = 0; i < nbytes; i++)
            for (size_t p = 0; p < sizeof patterns; p++) {
                for (int side = 0; side < 2; side++) {
                    memcpy(control, pristine, nbytes);
                    if (!has_close)
                        atomic_store(&control->reader_record.kind, RING_NONE);
                    ((unsigned char *)control)[i] ^= patterns[p];
                    if (side == 0)
                        read_damaged(control);
                    else
                        write_damaged(control, &writer);
                }
            }
    free(control);
    free(pristine);
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "flips") == 0) {
        run_flips();
        return 0;
    }
    static const uint64_t starts[] = {0, (1ull << 32) - 5, (1ull << 63) - 5, UINT64_MAX - 5};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        run_peers((struct job){.total = 3000, .last = RING_RECORD_END}, starts[i]);
        run_peers((struct job){.total = 100, .last = RING_RECORD_ERROR}, starts[i]);
        run_peers((struct job){.total = 100, .last = RING_RECORD_END, .close_after = 50},
                  starts[i]);
    }
    return 0;
}
